"""What the engine tells of its prefix cache: a snapshot and the changes behind it are what a lookup can hit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qwire import prefix
from tests.helpers.fake_runner import FakeRunner
from worker.engine.engine import Engine, StepReport
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request

ROOT = prefix.root(b"model", "float32", 4, "", b"")


def make_engine(num_blocks: int = 16, max_running: int = 4) -> Engine:
    return Engine(
        FakeRunner(num_blocks, 4),
        SchedulerLimits(16, max_running),
        max_waiting=100,
        clock=lambda: 0.0,
        deliver=lambda report: None,
        fault=lambda keys: None,
    )


def request(key: str, prompt: list[int], count: int = 1, *, use_cache: bool = True) -> Request:
    return Request(key, prompt, max_tokens=count, prefix_root=ROOT, use_prefix_cache=use_cache)


class Watcher:
    """A set that follows the reports, once there was a snapshot."""

    def __init__(self) -> None:
        self.held: set[bytes] | None = None

    def take(self, report: StepReport) -> None:
        if report.snapshot is not None:
            self.held = set(report.snapshot)
        elif self.held is not None:
            self.held |= set(report.cache.stored)
            self.held -= set(report.cache.removed)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_what_a_watcher_holds_is_what_a_lookup_hits(data: st.DataObject) -> None:
    engine = make_engine(max_running=data.draw(st.integers(1, 4)))
    watcher, prompts = Watcher(), []
    for number in range(data.draw(st.integers(1, 14))):
        if data.draw(st.integers(0, 3)) == 0:
            watcher.held = None
            engine.watch_cache(data.draw(st.booleans()))  # off, on, or on again
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=30))
        prompts.append(prompt)
        engine.submit(request(str(number), prompt, data.draw(st.integers(1, 20)), use_cache=number % 5 != 4))
        for _ in range(data.draw(st.integers(0, 4))):
            report = engine.step()
            if report is not None:
                watcher.take(report)
            if watcher.held is not None:
                assert watcher.held == set(engine.pool.hashes())
        if data.draw(st.integers(0, 3)) == 0:
            engine.abort([str(data.draw(st.integers(0, number)))])
    engine.watch_cache(True)
    while (report := engine.step()) is not None:
        watcher.take(report)
    assert watcher.held is not None
    engine.pool.check()
    for prompt in prompts:
        hashes = prefix.block_hashes(ROOT, prompt, 4)
        held = next((index for index, name in enumerate(hashes) if name not in watcher.held), len(hashes))
        assert held == len(engine.pool.lookup(hashes))


def test_a_snapshot_comes_from_an_engine_that_has_nothing_to_do() -> None:
    engine = make_engine()
    engine.watch_cache(True)
    report = engine.step()
    assert report is not None
    assert (report.snapshot, report.sequences) == ([], [])
    assert engine.step() is None


def test_reports_say_nothing_of_the_cache_while_nobody_watches() -> None:
    engine = make_engine()
    engine.submit(request("a", [1] * 8))
    report = engine.step()
    assert report is not None
    assert not report.cache
    assert report.snapshot is None
