"""From logits to drawn ids: edits, the draw, and the log-probabilities that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from worker.engine.plan import NO_TOKEN, Draw, Drawn
from worker.kernels import Kernels, SamplingBatch
from worker.runner.edits import build_edits


class Fetched(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> Sequence[Tensor]: ...


@dataclass(frozen=True, slots=True)
class Here:
    """Tensors that are on the host."""

    tensors: Sequence[Tensor]

    def wait(self) -> Sequence[Tensor]:
        return self.tensors


@dataclass(frozen=True, slots=True)
class Drawing:
    """Draws that a device has begun."""

    tokens: Tensor
    """int64 [draws], where the logits were."""
    _asked: Sequence[tuple[int, int]]
    """Rows with log-probabilities, and how many alternatives each."""
    _restricted: Sequence[int]
    """Rows that may have been left without an id."""
    _fetched: Fetched

    def read(self) -> list[Drawn]:
        """Waits for the ids; `NO_TOKEN` where edits left none."""
        tokens, impossible, *logprobs = self._fetched.wait()
        drawn = [Drawn(token) for token in tokens.tolist()]
        if logprobs:
            rows = zip(self._asked, *(tensor.tolist() for tensor in logprobs), strict=True)
            for (row, count), logprob, top_ids, top_values in rows:
                top = tuple(zip(top_ids[:count], top_values[:count], strict=True))
                drawn[row] = Drawn(drawn[row].token_id, logprob, top)
        for row, none in zip(self._restricted, impossible.tolist(), strict=True):
            if none:
                drawn[row] = Drawn(NO_TOKEN)
        return drawn


def draw_all(
    kernels: Kernels,
    logits: Tensor,
    draws: Sequence[Draw],
    fetch: Callable[[Sequence[Tensor]], Fetched] = Here,
) -> Drawing:
    """Begins to draw one id for each row of float32 logits [draws, V], which are overwritten.

    Args:
        fetch: brings results to the host.
    """
    asked = [(row, draw.params.logprobs) for row, draw in enumerate(draws) if draw.params.logprobs is not None]
    rows = [row for row, _ in asked]
    raw = logits[rows] if asked else None  # a copy: edits don't show in log-probabilities
    edits = build_edits(draws, logits.shape[1])
    if edits is not None:
        kernels.edit_logits(logits, edits)
    tokens = kernels.sample(logits, build_sampling(draws))
    logprobs = () if raw is None else kernels.logprobs(raw, tokens[rows], max(count for _, count in asked))
    restricted = [row for row, draw in enumerate(draws) if draw.restricted]
    # Without an id to draw, the one that came out is as impossible as all others.
    impossible = (
        logits[restricted, tokens[restricted]] == -torch.inf if restricted else tokens.new_empty(0, dtype=torch.bool)
    )
    return Drawing(tokens, asked, restricted, fetch((tokens, impossible, *logprobs)))


def score_all(kernels: Kernels, logits: Tensor, ids: Sequence[int], count: int) -> list[Drawn]:
    """The log-probability of one given id for each row of float32 logits [rows, V], and of the `count` best."""
    own, top_ids, top_values = kernels.logprobs(logits, torch.tensor(ids), count)
    rows = zip(ids, own.tolist(), top_ids.tolist(), top_values.tolist(), strict=True)
    return [Drawn(token, value, tuple(zip(best, values, strict=True))) for token, value, best, values in rows]


def build_sampling(draws: Sequence[Draw]) -> SamplingBatch:
    """One row a draw."""
    count = len(draws)
    return SamplingBatch(
        temperature=np.fromiter((draw.params.temperature for draw in draws), np.float32, count),
        top_k=np.fromiter((draw.params.top_k for draw in draws), np.int64, count),
        top_p=np.fromiter((draw.params.top_p for draw in draws), np.float64, count),
        min_p=np.fromiter((draw.params.min_p for draw in draws), np.float64, count),
        seed=np.fromiter((draw.params.seed for draw in draws), np.uint64, count),
        choice=np.fromiter((draw.choice for draw in draws), np.int64, count),
        position=np.fromiter((draw.position for draw in draws), np.int64, count),
    )
