"""`qwire up`: all services on this machine."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys

import click

from qwire import hub
from qwire._channel import DEFAULT_ADDRESS
from qwire.stack import Stack, StackConfig, StackError, serve

_MARGIN_SECONDS = 5.0


@click.command()
@click.argument("model", default=hub.DEMO)
@click.option("--listen", default=DEFAULT_ADDRESS, metavar="ADDRESS", help="Where clients connect; port 0 picks one.")
@click.option("--served-model-name", metavar="NAME", help="What requests call the model.  [default: as MODEL]")
@click.option("--dtype", metavar="NAME", help="What weights are kept in that are not quantized, such as float32.")
@click.option("--quantize", metavar="FORMAT", help="What weights are quantized to: none, int8 or int4.")
@click.option("--backend", metavar="NAME", help="Kernels of the workers: auto, cuda, cpu or reference.")
@click.option("--kv-cache-mib", type=click.IntRange(1), metavar="MIB", help="Memory for each worker's KV cache.")
@click.option("--workers", type=click.IntRange(1, 999), default=1, help="Worker processes, each with the whole model.")
@click.option(
    "--placement",
    type=click.Choice(["prefix", "least-loaded", "round-robin"]),
    default="prefix",
    show_default=True,
    help="Which worker takes a request.",
)
@click.option("--grace", type=click.FloatRange(0), default=30.0, metavar="SECONDS", help="Time to drain when stopped.")
@click.option("--worker-flags", default="", metavar="'--FLAG VALUE ...'", help="More flags for `worker serve`.")
@click.option("--router-flags", default="", metavar="'--FLAG VALUE ...'", help="More flags for `router serve`.")
def up(
    model: str,
    listen: str,
    served_model_name: str | None,
    dtype: str | None,
    quantize: str | None,
    backend: str | None,
    kv_cache_mib: int | None,
    workers: int,
    placement: str,
    grace: float,
    worker_flags: str,
    router_flags: str,
) -> None:
    """Starts a tokenizer service, workers and a router, and keeps them running.

    MODEL is a folder, a hub id such as Qwen/Qwen3-0.6B, or demo. Ctrl-C drains and stops; a second one kills.
    """
    given = {"--dtype": dtype, "--quantize": quantize, "--backend": backend, "--kv-cache-mib": kv_cache_mib}
    flags = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
    # Workers that each take every core for themselves are slower together than one alone. What the user says comes
    # later on the command line, and wins.
    flags += [] if workers == 1 else ["--threads", str(max(1, len(os.sched_getaffinity(0)) // workers))]
    try:
        config = StackConfig(
            model=hub.resolve(model, sys.stderr),
            served_model_name=served_model_name or hub.served_name(model),
            listen=listen,
            workers=workers,
            worker_flags=[*flags, *shlex.split(worker_flags)],
            router_flags=["--placement", placement, "--grace", f"{grace:g}", *shlex.split(router_flags)],
            # The router ends what is left by itself; this is for one that hangs.
            router_grace=grace + _MARGIN_SECONDS,
        )
        asyncio.run(serve(config, lambda stack: _announce(stack, config)))
    except (hub.HubError, StackError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:  # While the model was being fetched.
        sys.exit(130)


def _announce(stack: Stack, config: StackConfig) -> None:
    click.echo(f"ready: {config.served_model_name} on {stack.address}")
    sys.stdout.flush()
