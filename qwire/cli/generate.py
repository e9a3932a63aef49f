"""`qwire generate`: one request."""

from __future__ import annotations

import json
from typing import Any, TextIO

import click

from qwire._request import generate_request
from qwire.cli import _options
from qwire.cli._output import message_json, reported_errors, write
from qwire.client import Client, Generation


@click.command()
@_options.address_option
@_options.model_option
@click.option("--prompt", metavar="TEXT", help="The whole prompt; special-token markers in it count.")
@click.option("--chat", metavar="TEXT", help="One user turn, rendered by the model's chat template.")
@click.option("--messages", type=click.File(encoding="utf-8"), help="A JSON list of chat messages; - is stdin.")
@click.option("--token-ids", type=_options.id_list, metavar="ID,ID,...", help="The prompt as token ids.")
@_options.sampling_options
@click.option("--n", type=int, help="Number of choices.")
@click.option("--logprobs", type=int, help="Log-probabilities of the drawn token and of this many others.")
@click.option("--request-id", metavar="ID", help="Names the request in logs and errors.")
@click.option("--priority", type=int, help="Higher is served first; -10 to 10.")
@click.option("--tenant", metavar="NAME", help="On whose behalf; tenants share time, never cached prefixes.")
@click.option("--bypass", is_flag=True, default=None, help="Don't use the prefix cache.")
@click.option("--scope", metavar="TEXT", help="Share cached prefixes only within this scope.")
@click.option(
    "--continuity",
    type=click.Choice(["exact", "best-effort"]),
    help="What to do when the worker is lost and none gives exactly the same tokens: end, or go on.",
)
@click.option("--timeout", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Give up after this time.")
@click.option("--json", "as_json", is_flag=True, help="Print each message of the stream as a line of JSON.")
def generate(
    address: tuple[str, ...],
    tenant: str | None,
    timeout: float | None,
    as_json: bool,
    messages: TextIO | None,
    **options: Any,
) -> None:
    """Generates from a prompt and prints the text as it comes.

    Exactly one of --prompt, --chat, --messages and --token-ids is needed.
    """
    prompt = options.pop("prompt")
    options = {**_options.flatten_lists(options), "messages": _read(messages)}
    try:
        request = generate_request(prompt, options)  # type: ignore[arg-type]  # The names are GenerateOptions' own.
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    with (
        reported_errors(as_json=as_json),
        Client(address, metadata=[("qwire-tenant", tenant)] if tenant is not None else ()) as client,
        client.generate_request(request, timeout=timeout) as generation,
    ):
        if as_json:
            for response in generation.responses():
                click.echo(message_json(response))
        else:
            _print_text(generation)


def _read(file: TextIO | None) -> Any:
    if file is None:
        return None
    try:
        return json.load(file)
    except ValueError as error:
        raise click.BadParameter(f"no JSON: {error}", param_hint="--messages") from error


def _print_text(generation: Generation) -> None:
    try:
        for delta in generation:
            if delta.choice == 0:
                write(delta.text)
    finally:
        if generation.text:  # Before an error's message, too.
            click.echo()
    for index, choice in generation.choices.items():
        if index > 0:  # Side by side they would be a jumble.
            click.echo(f"--- choice {index}\n{choice.text}")
