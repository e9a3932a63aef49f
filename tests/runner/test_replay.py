"""Recorded steps: the bits of steps that nothing records, and no recording of what can't be replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.models import write_random_qwen3
from tests.helpers.steps import GREEDY, chunk, plan, table
from worker.engine.plan import Chunk, Draw, SamplingParams, StepPlan
from worker.kernels import choose_kernels
from worker.kernels.cpu.select import argmax
from worker.model.layers import RMSNorm
from worker.model.qwen import Buffers
from worker.runner import TorchRunner, replay

IDS = [(17 * i + i * i) % 512 for i in range(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    windowed = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}
    return write_random_qwen3(tmp_path_factory.mktemp("model"), dtype="bfloat16", layers=3, config=windowed)


def make(folder: Path, **options: str) -> TorchRunner:
    return TorchRunner(folder, num_blocks=128, kernels=choose_kernels("cpu").kernels, **options)  # type: ignore[arg-type]


def plain(runner: TorchRunner) -> TorchRunner:
    """The same, with nothing recorded."""
    runner._replay = None
    return runner


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=4), min_size=1, max_size=12),
    st.sampled_from(["none", "int8"]),
    st.sampled_from(["auto", "int8"]),
)
def test_any_steps_have_the_bits_that_they_have_unrecorded(
    folder: Path, steps: list[list[tuple[int, int]]], quantize: str, kv_dtype: str
) -> None:
    """Steps add so many ids to some of four sequences; they grow, shrink and come again."""
    recorded = make(folder, quantize=quantize, kv_dtype=kv_dtype)
    eager = plain(make(folder, quantize=quantize, kv_dtype=kv_dtype))
    done = [0] * 4
    for step in [*steps, *steps]:
        chunks = []
        for index, count in dict(step).items():
            ids = IDS[done[index] : done[index] + count]
            if ids:
                chunks.append(chunk(ids, done[index], table(32 * index, 400, 16)))
                done[index] += len(ids)
        if chunks:
            assert torch.equal(recorded.forward_logits(plan(*chunks)), eager.forward_logits(plan(*chunks)))
    assert recorded._replay is not None and recorded._replay._usable


def test_each_size_is_recorded_once_and_few_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 2)
    runner = make(folder)
    kept = runner._replay
    assert kept is not None
    for sizes, known in (((1, 1), 0), ((1, 1), 1), ((2,), 1), ((2,), 2), ((2,), 2), ((1, 1), 2), ((3,), 2), ((3,), 2)):
        runner.forward_logits(plan(*(chunk(IDS[:size], 0, table(32 * i, 100, 16)) for i, size in enumerate(sizes))))
        assert len(kept._recordings) == known
    for _ in range(2):
        runner.forward_logits(plan(chunk(IDS[: Buffers.ROWS + 1], 0, table(0, 100, 16))))
    assert list(kept._recordings) == [(2, 2), (3, 1)]


def test_a_new_cache_has_recordings_of_its_own(folder: Path) -> None:
    runner = make(folder)
    step = plan(chunk(IDS[:5], 0, table(0, 100, 16)))
    before = [runner.forward_logits(step) for _ in range(3)]
    runner.make_cache(64)
    assert all(torch.equal(runner.forward_logits(step), before[0]) for _ in range(3))
    assert all(torch.equal(logits, before[0]) for logits in before)
    assert runner.caches[0].keys[:, 0, :5].any()


def test_draws_and_scores_are_those_of_unrecorded_steps(folder: Path) -> None:
    """Steps of decodes, of a prompt's pieces, and of prompts whose log-probabilities are wanted, with block copies."""
    sampled = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=3, logprobs=2, frequency_penalty=0.2)

    def steps() -> Iterator[StepPlan]:
        yield plan(
            chunk(IDS[:9], 0, table(0, 100, 16), Draw(GREEDY, 0, 0)),
            Chunk(tuple(IDS[40:52]), 0, table(32, 100, 16), (Draw(sampled, 0, 0),), 0, tuple(IDS[41:53]), 2),
        )
        for count in range(6):
            first = chunk(IDS[9 + count : 10 + count], 9 + count, table(0, 100, 16), Draw(GREEDY, 0, 1 + count))
            second = chunk(IDS[52 + count : 53 + count], 12 + count, table(32, 100, 16), Draw(sampled, 0, 1 + count))
            yield plan(first, second) if count % 2 else plan(chunk(IDS[9:10], 9, table(64, 100, 16)), second, first)
        yield StepPlan((chunk(IDS[15:16], 15, (90, *table(1, 84, 16)), Draw(sampled, 1, 9)),), ((0, 90),))

    recorded, eager = make(folder, kv_dtype="int8"), plain(make(folder, kv_dtype="int8"))
    for _ in range(3):
        for step in steps():
            assert recorded.execute(step) == eager.execute(step)
    assert recorded._replay is not None and recorded._replay._recordings


@pytest.mark.parametrize(
    "change", [lambda x: x * 2.0, lambda x: x.mul_(2.0), lambda x: x.__iadd__(x), torch.Tensor.abs_]
)
def test_what_torch_computes_is_never_replayed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    own = RMSNorm.__call__

    def changed(self: RMSNorm, x: torch.Tensor, *more: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return own(self, change(x), *more)

    monkeypatch.setattr(RMSNorm, "__call__", changed)
    runner, eager = make(folder), plain(make(folder))
    for count in range(6):
        step = plan(chunk(IDS[count : count + 1], count, table(0, 100, 16)))
        assert torch.equal(runner.forward_logits(step), eager.forward_logits(step))
    assert runner._replay is not None and not runner._replay._recordings


def test_calls_that_programs_do_not_take_are_noticed() -> None:
    native = choose_kernels("cpu").kernels.native  # type: ignore[attr-defined]
    program, logits = native.Program(), torch.zeros(1, 16)
    program.record()
    try:
        argmax(native, logits)
    finally:
        program.stop()
    assert not program.complete and len(program) == 0
    argmax(native, logits)
    assert native.Program().complete
