"""`qwire chat`: a conversation."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from qwire.cli import _options
from qwire.cli._output import error_text, write
from qwire.client import Client
from qwire.errors import QwireError

_HELP = "/exit or Ctrl-D leaves, /reset forgets the conversation, Ctrl-C stops an answer."


@click.command()
@_options.address_option
@_options.model_option
@click.option("--system", metavar="TEXT", help="Instructions for the whole conversation.")
@_options.sampling_options
def chat(address: tuple[str, ...], model: str | None, system: str | None, **options: Any) -> None:
    """Talks with a model, turn by turn."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # Gives input() a history and line editing.
    settings = {**_options.flatten_lists(options), "model": model}
    start = [{"role": "system", "content": system}] if system is not None else []
    history = list(start)
    click.echo(_HELP, err=True)
    with Client(address) as client:
        while (line := _read_line()) is not None:
            if line == "/exit":
                return
            if line == "/reset":
                history = list(start)
            elif line.startswith("/"):
                click.echo(_HELP, err=True)
            elif line:
                user = {"role": "user", "content": line}
                answer = _answer(client, [*history, user], settings)
                # A turn without an answer is forgotten: templates want user and assistant to alternate.
                if answer:
                    history += [user, {"role": "assistant", "content": answer}]


def _read_line() -> str | None:
    """The next line, stripped; empty after Ctrl-C, None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except KeyboardInterrupt:
        click.echo(f"\n{_HELP}", err=True)
        return ""
    except EOFError:
        return None


def _answer(client: Client, messages: list[dict[str, str]], settings: dict[str, Any]) -> str:
    """Prints the answer as it comes; returns what there is of it when it ends, fails or is stopped."""
    text = ""
    try:
        with client.generate(messages=messages, **settings) as generation:
            for delta in generation:
                text += delta.text
                write(delta.text)
        click.echo()
    except KeyboardInterrupt:
        click.echo(" [stopped]")
    except QwireError as error:
        click.echo(f"\n{error_text(error)}", err=True)
    return text
