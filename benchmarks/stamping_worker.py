"""A fake worker whose ids say when they were drawn: `python -m benchmarks.stamping_worker serve ...`.

Whoever reads them on the same machine knows how long they took, without a log to compare with.
"""

from __future__ import annotations

import sys
import time

import click

from qwire.service.config import command
from qwire.service.server import run
from worker.engine.plan import Draw, Drawn
from worker.fake.__main__ import serve
from worker.fake.config import FakeWorkerConfig
from worker.fake.runner import FakeRunner

STAMPS = 32_768
"""Ids, each a tenth of a millisecond: they come again after 3.3 seconds."""
PER_SECOND = 10_000


def stamp() -> int:
    return int(time.monotonic() * PER_SECOND) % STAMPS


def age(token: int, now: float) -> float:
    """Seconds between the draw of an id and `now`, on the monotonic clock: less than 3 of them."""
    return (now * PER_SECOND - token) % STAMPS / PER_SECOND


class StampingRunner(FakeRunner):
    """Draws the time. The step has taken its time by then, so that is when the id is there."""

    def execute(self, plan: object) -> list[list[Drawn]]:
        drawn = super().execute(plan)  # type: ignore[arg-type]
        now = Drawn(stamp())
        return [[now] * len(draws) for draws in drawn]

    def draw(self, mark: int, draw: Draw) -> Drawn:
        return Drawn(0)


@click.group()
def main() -> None:
    """A fake worker that stamps."""


main.add_command(
    command(FakeWorkerConfig, lambda config: run(lambda: serve(config, StampingRunner)), service="fake_worker")
)

if __name__ == "__main__":
    sys.exit(main(prog_name="python -m benchmarks.stamping_worker"))
