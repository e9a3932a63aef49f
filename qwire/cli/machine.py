"""`qwire quantize`, `bench` and `doctor`: the worker's commands, for models by any name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from qwire import hub

_FORWARDED = {"ignore_unknown_options": True}


def _worker(*arguments: str) -> None:
    """Runs a command of the worker and exits with its status."""
    sys.exit(subprocess.call([sys.executable, "-m", "worker", *arguments]))


def _folder(model: str) -> str:
    try:
        return str(hub.resolve(model, sys.stderr))
    except hub.HubError as error:
        raise click.ClickException(str(error)) from error


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(["int8", "int4"]), required=True, help="Of the weights.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A UTF-8 text like what the model will meet, to choose int4 weights by, instead of qwire's own.",
)
def quantize(model: str, out: Path, format_: str, text: Path | None) -> None:
    """Writes a model with quantized weights to the folder OUT: for faster starts than quantizing while loading, and
    for int4, better weights.

    MODEL is a folder, a hub id such as Qwen/Qwen3-0.6B, or demo.
    """
    chosen = () if text is None else ("--text", str(text))
    _worker("quantize", _folder(model), str(out), "--format", format_, *chosen)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def doctor(as_json: bool) -> None:
    """Measures this machine's limits, and says which kernels would run on it and why."""
    _worker("doctor", *(["--json"] if as_json else []))


@click.group()
def bench() -> None:
    """Measures speeds."""


@bench.command(context_settings=_FORWARDED)
@click.option("--model", default=hub.DEMO, metavar="MODEL", help="Folder, hub id, or demo.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def engine(model: str, options: Sequence[str]) -> None:
    """Times prefill and decode of the step loop, beside this machine's limits.

    Options go to the worker: --quantize none|int8|int4, --case BATCH,PROMPT,NEW (repeatable), --dtype, --kv-dtype,
    --backend, --isa, --threads, --max-step-tokens, --json.
    """
    _worker("bench", "engine", "--model", _folder(model), *options)
