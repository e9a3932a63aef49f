"""Step plans for driving a runner without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.plan import Chunk, Draw, SamplingParams, StepPlan
from worker.runner import TorchRunner

GREEDY = SamplingParams()


def table(first: int, positions: int, block_size: int) -> tuple[int, ...]:
    """Consecutive blocks from `first`, enough for `positions`."""
    return tuple(range(first, first + -(-positions // block_size)))


def chunk(ids: Sequence[int], start: int, blocks: Sequence[int], *draws: Draw) -> Chunk:
    return Chunk(tuple(ids), start, tuple(blocks), draws)


def plan(*chunks: Chunk) -> StepPlan:
    return StepPlan(chunks)


def logits_of(runner: TorchRunner, ids: Sequence[int], blocks: Sequence[int], pieces: Sequence[int]) -> Tensor:
    """Teacher-forced logits [len(ids), V], computed in chunks of these sizes (the last one repeats)."""
    out, start, turn = [], 0, 0
    while start < len(ids):
        size = pieces[min(turn, len(pieces) - 1)]
        out.append(runner.forward_logits(plan(chunk(ids[start : start + size], start, blocks))))
        start, turn = start + size, turn + 1
    return torch.cat(out)


def greedy(runner: TorchRunner, prompt: Sequence[int], count: int, blocks: Sequence[int]) -> list[int]:
    """`count` greedy ids after the prompt, decoded one step at a time."""
    made: list[int] = []
    ids, start = list(prompt), 0
    for position in range(count):
        ((drawn,),) = runner.execute(plan(chunk(ids, start, blocks, Draw(GREEDY, 0, position))))
        start, ids = start + len(ids), [drawn.token_id]
        made.append(drawn.token_id)
    return made
