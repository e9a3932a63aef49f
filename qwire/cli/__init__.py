"""The `qwire` command."""

from __future__ import annotations

import os

# Before gRPC is imported. Its notices are written from threads that it waits for as the process ends: where nobody
# reads standard error, `qwire up` would never end.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import click

from qwire import __version__
from qwire.cli.chat import chat
from qwire.cli.demo import demo
from qwire.cli.fetch import fetch
from qwire.cli.generate import generate
from qwire.cli.machine import bench, doctor, quantize
from qwire.cli.models import models
from qwire.cli.up import up

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="qwire")
def main() -> None:
    """Qwen models behind gRPC."""


for _command in (up, demo, fetch, quantize, generate, chat, models, bench, doctor):
    main.add_command(_command)
