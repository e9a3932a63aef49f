"""`qwire models`: what is served."""

from __future__ import annotations

import click

from qwire.cli import _options
from qwire.cli._output import message_json, reported_errors
from qwire.client import Client


@click.command()
@_options.address_option
@click.option("--timeout", type=float, default=10.0, metavar="SECONDS", help="Give up after this time.")
@click.option("--json", "as_json", is_flag=True, help="Print each model as a line of JSON.")
def models(address: tuple[str, ...], timeout: float, as_json: bool) -> None:
    """Lists the served models."""
    with reported_errors(as_json=as_json), Client(address) as client:
        for model in client.models(timeout=timeout):
            if as_json:
                click.echo(message_json(model))
            else:
                quantization = "" if model.quantization in ("", "none") else f", {model.quantization}"
                click.echo(
                    f"{model.name}: {model.architecture}, context {model.context_length}, {model.dtype}{quantization}"
                )
