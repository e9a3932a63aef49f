"""`python -m worker serve|bench|convert|doctor|quantize`: the commands, each with what it takes to run.

This module imports no torch, which takes seconds: `serve --help` and settings that cannot be are answered before it,
and `serve` begins what needs none.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import ClassVar

import click

from qwire.service.config import command
from worker.config import WorkerConfig
from worker.model import WeightsDigest


def serve(config: WorkerConfig) -> None:
    """Serves until told to stop, and exits. Raises ConfigError."""
    weights = WeightsDigest(config.model)
    with weights.reading_ahead():
        serving = load_module("worker.serving")
    serving.launch(config, weights)


def load_module(name: str) -> ModuleType:
    """Imports a module that brings torch.

    What an import makes, stays: looking for garbage in it, while it is made and once it is, would take a tenth of the
    time.
    """
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


class _Commands(click.Group):
    """Commands that are imported when they are run: starting to serve shall not wait for the others' libraries."""

    LAZY: ClassVar[Mapping[str, str]] = {
        "bench": "worker.bench:bench_command",
        "convert": "worker.convert:convert_command",
        "doctor": "worker.doctor:doctor_command",
        "quantize": "worker.quantize:quantize_command",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *self.LAZY])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.LAZY:
            return super().get_command(ctx, cmd_name)
        module, _, name = self.LAZY[cmd_name].partition(":")
        found: click.Command = getattr(load_module(module), name)
        return found


@click.group(cls=_Commands)
def main() -> None:
    """A worker: the model, its KV cache and the step loop."""


main.add_command(command(WorkerConfig, serve, service="worker"))

if __name__ == "__main__":
    sys.exit(main(prog_name="python -m worker"))
