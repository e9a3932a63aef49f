"""Two and three ranks against one, at runner level: any shape gives its logits, and no row's bits follow its batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.models import write_random_qwen2, write_random_qwen3
from tests.helpers.ranks import Job, results_on_ranks
from tests.helpers.steps import chunk, plan, table
from worker.engine.plan import StepPlan
from worker.runner import TorchRunner

TOLERANCE = 1e-4


def random_ids(count: int, seed: int, vocab: int = 512) -> list[int]:
    ids: list[int] = torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def shapes(world: int) -> st.SearchStrategy[dict[str, Any]]:
    """Shapes that `world` ranks can share; KV heads fewer than ranks, or a multiple of them."""
    kv_heads = st.sampled_from([1, world, 2 * world])

    def with_heads(kv: int) -> st.SearchStrategy[dict[str, Any]]:
        group = st.integers(1, 3).map(lambda g: g * world if kv == 1 else g)
        return st.fixed_dictionaries(
            {
                "kv_heads": st.just(kv),
                "heads": group.map(lambda g: g * kv),
                "head_dim": st.sampled_from([16, 64, 80]),
                "hidden": st.sampled_from([64, 96]),
                "intermediate": st.sampled_from([world * 32, world * 50]),
                # Vocabularies that divide and that do not; in the smallest a rank holds padding alone.
                "vocab": st.sampled_from([4, 97, 512, 515]),
                "tie": st.booleans(),
                "seed": st.integers(0, 100),
            }
        )

    return kv_heads.flatmap(with_heads)


@pytest.mark.parametrize("world", [2, 3])
def test_random_shapes_give_the_logits_of_one_rank(tmp_path: Path, world: int) -> None:
    jobs: list[Job] = []

    @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(shapes(world), st.booleans())
    def draw(shape: dict[str, Any], qwen3: bool) -> None:
        folder, vocab = tmp_path / str(len(jobs)), shape["vocab"]
        if qwen3:
            write_random_qwen3(folder, **shape)
        else:
            hidden = shape["heads"] * shape["head_dim"]
            del shape["head_dim"]
            write_random_qwen2(folder, **{**shape, "hidden": hidden})
        long, short = random_ids(300, shape["seed"], vocab), random_ids(9, shape["seed"] + 1, vocab)
        blocks, other = table(0, 300, 16), table(30, 9, 16)
        plans = [
            plan(chunk(long[:280], 0, blocks)),
            plan(chunk(short, 0, other), chunk(long[280:281], 280, blocks)),
            plan(chunk(long[281:], 281, blocks)),
        ]
        jobs.append(Job(folder, plans, num_blocks=32))

    draw()
    for job, got in zip(jobs, results_on_ranks(world, jobs, tmp_path / "scratch"), strict=True):
        alone = TorchRunner(job.folder, num_blocks=job.num_blocks)
        for step, logits in zip(job.plans, got, strict=True):
            assert (logits - alone.forward_logits(step)).abs().max() <= TOLERANCE


def pieces(
    ids: list[int], sizes: list[int], blocks: tuple[int, ...], mates: list[int]
) -> tuple[list[StepPlan], list[int]]:
    """Plans that compute `ids` in chunks of `sizes` (the last repeats), between mates; and where its rows begin."""
    plans, firsts, start, turn = [], [], 0, 0
    while start < len(ids):
        size = sizes[min(turn, len(sizes) - 1)]
        own = chunk(ids[start : start + size], start, blocks)
        before = [chunk(random_ids(count, 50 + turn), 0, table(100 + 10 * i, 64, 16)) for i, count in enumerate(mates)]
        after = [chunk(random_ids(3, turn), 0, table(180, 64, 16))] if turn % 2 else []
        plans.append(plan(*before[: turn % 3], own, *after))
        firsts.append(sum(mates[: turn % 3]))
        start, turn = start + size, turn + 1
    return plans, firsts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_do_not_depend_on_their_batch(tmp_path: Path, dtype: str) -> None:
    folder = write_random_qwen3(tmp_path / "model", heads=6, kv_heads=2, hidden=192, vocab=515)
    ids = random_ids(270, 7)
    whole = Job(folder, [plan(chunk(ids, 0, table(0, 270, 16)))], dtype)
    jobs, begins = [whole], []
    for sizes, mates in (([1], []), ([240, 1, 17, 1], []), ([40, 1, 1, 90], [33, 2]), ([100, 31, 1], [1, 47])):
        plans, firsts = pieces(ids, sizes, table(20, 270, 16), mates)
        if sizes == [1]:
            plans, firsts = plans[:40], firsts[:40]
        jobs.append(Job(folder, plans, dtype))
        begins.append(firsts)
    (expected,), *others = results_on_ranks(2, jobs, tmp_path / "scratch")
    for job, firsts, got in zip(jobs[1:], begins, others, strict=True):
        rows: list[Tensor] = []
        for step, first, logits in zip(job.plans, firsts, got, strict=True):
            own = next(piece for piece in step.chunks if piece.block_table == table(20, 270, 16))
            rows.append(logits[first : first + len(own.token_ids)])
        together = torch.cat(rows)
        assert torch.equal(together, expected[: len(together)])
