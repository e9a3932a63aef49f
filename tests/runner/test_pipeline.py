"""A pipeline's stages: who has what of a model, a step in parts, and the bits of one stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.models import write_random_qwen2, write_random_qwen3
from tests.helpers.ranks import Job, result, results_on_ranks
from tests.helpers.steps import chunk, plan, table
from worker.engine.plan import Chunk, Draw, SamplingParams
from worker.kernels import RaggedBatch
from worker.kernels.reference import ReferenceKernels
from worker.model import ModelConfig, ModelError, check_stages, load_model, stage_layers
from worker.model.plan import stage_of
from worker.parallel import Group
from worker.runner import TorchRunner
from worker.runner.batch import PART_ROWS, StepArrays, build_step, only_rows, pipeline_parts


@given(layers=st.integers(1, 100), stages=st.integers(1, 20))
def test_every_layer_is_in_one_stage(layers: int, stages: int) -> None:
    parts = [stage_layers(layers, stage, stages) for stage in range(stages)]
    assert [layer for part in parts for layer in part] == list(range(layers))
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts) and counts[0] == max(counts)


def test_places_in_a_group() -> None:
    groups = [Group(index, 2, 3) for index in range(6)]
    assert [(group.stage, group.rank) for group in groups] == [(2, 0), (2, 1), (1, 0), (1, 1), (0, 0), (0, 1)]
    assert [group.last_stage for group in groups] == [True, True, False, False, False, False]
    assert [group.first_stage for group in groups] == [False, False, False, False, True, True]
    with pytest.raises(ValueError, match="rank 6"):
        Group(6, 2, 3)


@pytest.mark.parametrize("tie", [True, False])
def test_each_stage_reads_what_is_its_own(tmp_path: Path, tie: bool) -> None:
    folder = write_random_qwen3(tmp_path, layers=3, tie=tie)
    config = ModelConfig.read(folder)
    names = []
    for index in (1, 0):  # the first stage is that of the last rank
        model = load_model(folder, config, ReferenceKernels(), torch.float32, group=Group(index, 1, 2))
        names.append({name for name, module in model.named_modules() if hasattr(module, "parts")})
    first, last = names
    assert not first & last
    assert first == {
        name for name in first if name.startswith(("model.embed_tokens", "model.layers.0", "model.layers.1"))
    }
    assert {"model.norm", "lm_head", "model.layers.2.mlp.down_proj"} <= last
    whole = load_model(folder, config, ReferenceKernels(), torch.float32)
    assert first | last == {name for name, module in whole.named_modules() if hasattr(module, "parts")}


@pytest.mark.parametrize(
    ("extra", "stage"),
    [("model.layers.0.mlp.extra.weight", 0), ("model.layers.2.mlp.extra.weight", 1), ("model.other.weight", 1)],
)
def test_what_is_not_part_of_the_model_is_told_by_the_stage_that_would_have_it(
    tmp_path: Path, extra: str, stage: int
) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_random_qwen3(tmp_path, layers=3)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, extra: torch.zeros(2)}, folder / "model.safetensors")
    config = ModelConfig.read(folder)
    assert stage_of(extra, 3, 2) == stage
    for index in (0, 1):
        group = Group(index, 1, 2)
        if group.stage == stage:
            with pytest.raises(ModelError, match=extra):
                load_model(folder, config, ReferenceKernels(), torch.float32, group=group)
        else:
            load_model(folder, config, ReferenceKernels(), torch.float32, group=group)


def test_more_stages_than_layers(tmp_path: Path) -> None:
    config = ModelConfig.read(write_random_qwen3(tmp_path, layers=3))
    check_stages(config, 3)
    with pytest.raises(ModelError, match="num_hidden_layers, 3, cannot be cut into 4 stages"):
        check_stages(config, 4)


def where(ragged: RaggedBatch) -> list[tuple[int, tuple[int, ...]]]:
    """Each row's position and block table."""
    return [
        (int(start) + offset, tuple(table.tolist()))
        for start, length, table in zip(ragged.starts, ragged.lengths, ragged.block_tables, strict=True)
        for offset in range(int(length))
    ]


CHUNKS = st.lists(
    st.tuples(st.integers(1, 300), st.integers(0, 200), st.integers(0, 2), st.integers(0, 20)), min_size=1, max_size=12
)
"""Lengths, starts, draws and how many ids are scored."""


def made_step(chunks: list[tuple[int, int, int, int]]) -> StepArrays:
    made = [
        Chunk(
            range(length),
            start,
            table(33 * index, start + length, 16),
            [Draw(SamplingParams(), 0, 0)] * draws,
            scored=range(min(scored, length)),
        )
        for index, (length, start, draws, scored) in enumerate(chunks)
    ]
    return build_step(plan(*made), num_blocks=400, block_size=16, max_positions=4096, vocab_size=512)


@given(chunks=CHUNKS)
def test_rows_that_are_asked_for(chunks: list[tuple[int, int, int, int]]) -> None:
    step = made_step(chunks)
    ends = np.cumsum([length for length, *_ in chunks]).tolist()
    drawn = [end - 1 for end, (_, _, draws, _) in zip(ends, chunks, strict=True) for _ in range(draws)]
    scored = [
        row
        for end, (length, _, _, count) in zip(ends, chunks, strict=True)
        for row in range(end - length, end - length + min(count, length))
    ]
    assert step.hidden_rows[step.draw_rows].tolist() == drawn
    decodes = len(step.ids) == len(chunks)
    assert step.hidden_rows.tolist() == (list(range(len(step.ids))) if decodes else sorted({*drawn, *scored}))
    rows = step.last_layer_rows
    only = only_rows(step.ragged, rows)
    every = where(step.ragged)
    assert where(only) == [every[row] for row in rows.tolist()]
    assert only.lengths.min() >= 1
    assert len(only.lengths) <= 2 * len(chunks)


@given(chunks=CHUNKS, stages=st.integers(1, 5))
def test_parts_are_the_step(chunks: list[tuple[int, int, int, int]], stages: int) -> None:
    step = made_step(chunks)
    parts = list(pipeline_parts(step, stages))
    begins = np.cumsum([0, *(len(part.ids) for part in parts)])
    asked = [part.hidden_rows + begin for part, begin in zip(parts, begins[:-1], strict=True)]
    assert np.array_equal(np.concatenate(asked), step.hidden_rows)
    for name in ("ids", "positions", "slots"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(step, name))
    assert [row for part in parts for row in where(part.ragged)] == where(step.ragged)
    for part in parts:
        assert [position for position, _ in where(part.ragged)] == part.positions.tolist()
        assert part.ragged.lengths.min() >= 1
    assert len(parts) == 1 or all(len(part.ids) >= PART_ROWS for part in parts)
    assert (len(parts) > 1) == (stages > 1 and len(step.ids) >= 2 * PART_ROWS)


@pytest.mark.parametrize(("world", "stages"), [(1, 2), (1, 3), (2, 2)])
def test_stages_give_the_bits_of_one(tmp_path: Path, world: int, stages: int) -> None:
    folders = [
        write_random_qwen3(tmp_path / "tied", layers=3, heads=4, kv_heads=2),
        write_random_qwen3(tmp_path / "bf16", layers=4, heads=4, kv_heads=1, tie=False, dtype="bfloat16"),
        write_random_qwen2(tmp_path / "qwen2", layers=3, heads=4, kv_heads=2, hidden=256),
    ]
    long, short = [(7 * i) % 512 for i in range(600)], [(3 * i) % 512 for i in range(9)]
    blocks, third, other = table(0, 600, 16), table(38, 190, 16), table(50, 9, 16)
    draw = Draw(SamplingParams(), 0, 0)  # ranks know no other
    plans = [
        plan(chunk(long[:PART_ROWS], 0, blocks)),
        plan(chunk(long[PART_ROWS:400], PART_ROWS, blocks)),
        plan(chunk(short, 0, other), chunk(long[400:401], 400, blocks)),
        plan(chunk(long[401:], 401, blocks)),
        plan(chunk(long[: 2 * PART_ROWS], 0, blocks)),  # parts of the least size
        # Of a first part no hidden state is asked for.
        plan(
            chunk(long[:400], 0, blocks),
            Chunk(short, 0, other, (draw,), scored=[0] * 8),
            Chunk(long[5:195], 0, third, (draw,), scored=[0] * 3),
        ),
        plan(
            Chunk(long[:300], 0, blocks, (draw,), scored=[0] * 30),
            Chunk(short, 0, other, (draw,), scored=[0] * 8),
            chunk(long[:1], 0, third),
        ),
    ]
    jobs = [Job(folder, plans, num_blocks=64) for folder in folders]
    got = results_on_ranks(world, jobs, tmp_path / "pipeline", stages)
    if world > 1:
        expected = results_on_ranks(world, jobs, tmp_path / "stage")
    else:
        alone = [TorchRunner(job.folder, num_blocks=job.num_blocks) for job in jobs]
        expected = [[result(runner, step) for step in job.plans] for runner, job in zip(alone, jobs, strict=True)]
    for mine, theirs in zip(got, expected, strict=True):
        for one, other_one in zip(mine, theirs, strict=True):
            assert torch.equal(one, other_one)
