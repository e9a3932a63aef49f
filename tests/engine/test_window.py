"""Models whose every layer has a window: blocks behind it are given back, and nothing that is drawn changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwire import prefix
from tests.engine.harness import ROOT, Harness
from tests.helpers.models import write_random_qwen3
from worker.engine.engine import Engine, StepReport
from worker.engine.plan import Drawn, StepPlan
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.runner import TorchRunner


def draw(newest: Sequence[int], choice: int = 0) -> int:
    digest = hashlib.sha256(repr((choice, list(newest))).encode()).digest()
    return int.from_bytes(digest[:4], "little") % 1000


def expected(prompt: Sequence[int], count: int, window: int, choice: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(draw(tokens[-window:], choice))
    return tokens[len(prompt) :]


class WindowRunner:
    """Reads what a window covers, through the block table: what isn't there, or is another sequence's, is noticed."""

    def __init__(self, num_blocks: int, block_size: int, window: int) -> None:
        self.num_blocks, self.block_size, self.window = num_blocks, block_size, window
        self.cache: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)
        """A position's token, and the position."""
        self.tokens_computed = 0

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        size = self.block_size
        for source, target in plan.copies:
            self.cache[target * size : (target + 1) * size] = self.cache[source * size : (source + 1) * size]
        for chunk in plan.chunks:
            self.tokens_computed += len(chunk.token_ids)
            for position, token in enumerate(chunk.token_ids, chunk.start):
                self.cache[chunk.block_table[position // size] * size + position % size] = token, position
        drawn = []
        for chunk in plan.chunks:
            newest = []
            end = chunk.start + len(chunk.token_ids)
            for position in range(max(0, chunk.start - self.window + 1), end):
                entry = self.cache[chunk.block_table[position // size] * size + position % size]
                assert entry is not None and entry[1] == position
                newest.append(entry[0])
            drawn.append([Drawn(draw(newest[-self.window :], d.choice)) for d in chunk.draws])
        return drawn


class Windowed(Harness):
    def __init__(
        self, window: int, *, num_blocks: int, block_size: int, max_step_tokens: int, max_running: int
    ) -> None:
        super().__init__(num_blocks=num_blocks, block_size=block_size)
        self.limits = SchedulerLimits(max_step_tokens, max_running, window=window)
        self.engine = Engine(
            WindowRunner(num_blocks, block_size, window),
            self.limits,
            max_waiting=100,
            clock=lambda: self.now,
            deliver=self.take,
            fault=lambda keys: None,
        )

    def step(self) -> bool:
        stepped = super().step()
        self.engine.scheduler.check()
        size, window = self.engine.pool.block_size, self.limits.window
        assert window is not None
        for sequence in self.engine.scheduler.running:
            # What a query at the next position reads, the block that it begins, and a chunk's.
            assert len(sequence.held) <= -(-(window + self.limits.max_step_tokens) // size) + 1
            assert sequence.dropped == max(0, sequence.computed - window + 1) // size
        return stepped


@settings(max_examples=50, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=8),
    count=st.integers(1, 20),
    choices=st.integers(1, 3),
    window=st.integers(1, 24),
    spare=st.integers(0, 30),
    max_step_tokens=st.integers(1, 32),
    max_running=st.integers(1, 6),
    block_size=st.sampled_from([2, 4, 16]),
    use_cache=st.booleans(),
)
def test_any_life_gives_the_same_tokens_and_holds_no_more_than_the_window(
    prompts: list[list[int]],
    count: int,
    choices: int,
    window: int,
    spare: int,
    max_step_tokens: int,
    max_running: int,
    block_size: int,
    use_cache: bool,
) -> None:
    harness = Windowed(
        window,
        num_blocks=80 // block_size + 1 + spare,
        block_size=block_size,
        max_step_tokens=max_step_tokens,
        max_running=max_running,
    )
    for number, prompt in enumerate(prompts):
        harness.submit(str(number), prompt, count, choices=((),) * choices, use_prefix_cache=use_cache)
        harness.step()
    harness.run()
    for number, prompt in enumerate(prompts):
        for choice in range(choices):
            key = (str(number), choice) if choice else str(number)
            assert harness.ids[key] == expected(prompt, count, window, choice)
    assert harness.engine.pool.num_used == 0


def test_more_run_at_once_than_whole_sequences_would_fit() -> None:
    harness = Windowed(8, num_blocks=64, block_size=4, max_step_tokens=16, max_running=8)
    for number in range(8):
        harness.submit(str(number), [number] * 60, 180, use_prefix_cache=False)  # 60 blocks each
    while len(harness.engine.scheduler.running) < 8:
        assert harness.step()
    harness.run()
    assert harness.engine.scheduler.preemptions == 0


def test_a_prefix_is_hit_where_only_what_the_window_covers_is_left_of_it() -> None:
    harness = Windowed(8, num_blocks=30, block_size=4, max_step_tokens=32, max_running=2)
    history = [(7 * i) % 50 for i in range(80)]
    harness.submit("first", history, 1)
    harness.run()
    harness.submit("others", [50 + i for i in range(64)], 1)  # takes the blocks that were given back first
    harness.run()
    pool = harness.engine.pool
    assert not pool.lookup(prefix.block_hashes(ROOT, history, 4))
    harness.submit("next turn", [*history, 1, 2], 1)
    harness.run()
    assert harness.cached["next turn"] == 80
    assert harness.ids["next turn"] == expected([*history, 1, 2], 1, 8)


def generated(runner: TorchRunner, window: int | None, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """Tokens of each prompt, all at once, and how many blocks were used at most."""
    reports: list[StepReport] = []
    engine = Engine(
        runner,
        SchedulerLimits(32, 4, window=window),
        max_waiting=9,
        clock=lambda: 0.0,
        deliver=reports.append,
        fault=lambda keys: None,
    )
    ids: list[list[int]] = [[] for _ in prompts]
    for key, prompt in enumerate(prompts):
        engine.submit(Request(key, prompt, max_tokens=30, prefix_root=ROOT))
    most = 0
    while (report := engine.step()) is not None:
        most = max(most, engine.load.blocks_in_use)
        for sequence in report.sequences:
            ids[int(str(sequence.key))].append(sequence.drawn.token_id)
    return ids, most


@pytest.mark.parametrize("mixed", [False, True], ids=["every layer", "some layers"])
def test_a_models_tokens_are_the_same_with_and_without_its_old_blocks(tmp_path: Path, mixed: bool) -> None:
    window = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1 if mixed else 0}
    folder = write_random_qwen3(tmp_path / "windowed", config=window)
    runner = TorchRunner(folder, num_blocks=60, block_size=16)
    assert runner.window == (None if mixed else 24)
    prompts = [[(11 * i + 5 * number) % 500 for i in range(100)] for number in range(3)]
    whole, held_by_whole = generated(runner, None, prompts)
    kept, held = generated(runner, runner.window, prompts)
    assert kept == whole
    assert held_by_whole >= 3 * 8
    assert held == held_by_whole if mixed else held <= 3 * 4
