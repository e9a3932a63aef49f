"""An engine on a runner that notices every wrong block, stepped by hand."""

from __future__ import annotations

from collections.abc import Hashable

from qwire import prefix
from tests.helpers.fake_runner import FakeRunner
from worker.engine.engine import Engine, StepReport
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import EndReason, Request

ROOT = prefix.root(b"model", "float32", 4, "", b"")


class Harness:
    """An engine that is stepped by hand."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_step_tokens: int = 32,
        max_running: int = 8,
        positions_ahead: int = 0,
    ) -> None:
        self.runner = FakeRunner(num_blocks, block_size)
        self.now = 0.0
        self.ids: dict[Hashable, list[int]] = {}
        self.ends: dict[Hashable, EndReason] = {}
        self.cached: dict[Hashable, int] = {}
        self.expired: list[Hashable] = []
        self.engine = Engine(
            self.runner,
            SchedulerLimits(max_step_tokens, max_running, positions_ahead=positions_ahead),
            max_waiting=100,
            clock=lambda: self.now,
            deliver=self.take,
            fault=lambda keys: None,
        )

    def submit(self, key: str, prompt: list[int], count: int, **more: object) -> None:
        self.engine.submit(Request(key, prompt, max_tokens=count, prefix_root=ROOT, **more))  # type: ignore[arg-type]

    def take(self, report: StepReport) -> None:
        for sequence in report.sequences:
            key = (sequence.key, sequence.choice) if sequence.choice else sequence.key
            ids = self.ids.setdefault(key, [])
            assert sequence.token_index == len(ids)
            ids.append(sequence.drawn.token_id)
            if sequence.start is not None:
                self.cached[key] = sequence.start.cached_tokens
            if sequence.end is not None:
                self.ends[key] = sequence.end
        self.expired += report.expired

    def step(self) -> bool:
        report = self.engine.step()
        if report is not None:
            self.take(report)
        self.engine.pool.check()
        return report is not None

    def run(self) -> None:
        for _ in range(10_000):
            if not self.step():
                return
        raise AssertionError("the engine does not come to an end")
