"""From logits to drawn ids: edits, the draw, and the log-probabilities that were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worker.engine.plan import NO_TOKEN, Draw, Drawn
from worker.kernels import Kernels, SamplingBatch
from worker.runner.edits import build_edits


def draw_all(kernels: Kernels, logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """One id for each row of float32 logits [draws, V], which are overwritten; `NO_TOKEN` where edits leave none."""
    asked = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
    raw = logits[asked] if asked else None  # a copy: edits don't show in log-probabilities
    edits = build_edits(draws, logits.shape[1])
    if edits is not None:
        kernels.edit_logits(logits, edits)
    tokens = kernels.sample(logits, build_sampling(draws))
    drawn = [Drawn(token) for token in tokens.tolist()]
    if raw is not None:
        counts = [draws[row].params.logprobs or 0 for row in asked]
        own, ids, values = kernels.logprobs(raw, tokens[torch.tensor(asked)], max(counts))
        rows = zip(asked, counts, own.tolist(), ids.tolist(), values.tolist(), strict=True)
        for row, count, logprob, top_ids, top_values in rows:
            top = tuple(zip(top_ids[:count], top_values[:count], strict=True))
            drawn[row] = Drawn(drawn[row].token_id, logprob, top)
    restricted = [row for row, draw in enumerate(draws) if draw.restricted]
    if restricted:
        # Without an id to draw, the one that came out is as impossible as all others.
        impossible = logits[restricted, tokens[restricted]] == -torch.inf
        for row in torch.tensor(restricted)[impossible].tolist():
            drawn[row] = Drawn(NO_TOKEN)
    return drawn


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
