"""`Ops` in plain torch, for tests: right, and slow. Decodes read no value on the
host, so that they can be recorded; a draw brings its logits there, where the reference draws.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from worker.kernels.cuda.flash import Paged
from worker.kernels.cuda.ops import SamplingTensors
from worker.kernels.interface import KVCache, SamplingBatch
from worker.kernels.quantized import QuantizedWeight, dequantize
from worker.kernels.reference import dense, rope, sampling


class PlainOps:
    """Implements `Ops`."""

    name = "plain torch"

    def linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, out: Tensor | None) -> Tensor:
        made = torch.nn.functional.linear(x, dequantize(weight).to(x.dtype), bias)
        return made if out is None else out.copy_(made)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return dense.rms_norm(x, weight, eps, residual)

    def rope_and_cache(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        slots: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        out: Tensor,
    ) -> Tensor:
        return out.copy_(rope.rope_and_cache(qkv, cos, sin, cache, slots, q_norm, k_norm, eps))

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> Tensor:
        return out.copy_(dense.silu_mul(gate_up))

    def decode(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None, out: Tensor) -> Tensor:
        keys, values = (pool[:, where.tables.long()].flatten(2, 3) for pool in _pools(cache))
        attended = _attend(queries[:, None], keys, values, where.key_lengths.long()[:, None] - 1, window)
        return out.copy_(attended[:, 0])

    def mixed(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None, out: Tensor) -> Tensor:
        pools = _pools(cache)
        ends, starts = where.key_lengths.tolist(), where.query_starts.tolist()
        for sequence, end in enumerate(ends):
            rows = slice(starts[sequence], starts[sequence + 1])
            blocks = where.tables[sequence, : -(-end // cache.keys.shape[2])].long()
            keys, values = (pool[:, blocks].flatten(1, 2)[:, None] for pool in pools)
            at = torch.arange(end - (rows.stop - rows.start), end, device=queries.device)
            out[rows] = _attend(queries[None, rows], keys, values, at[None], window)[0]
        return out

    def sample(self, logits: Tensor, rows: SamplingTensors) -> Tensor:
        batch = SamplingBatch(
            rows.temperature.cpu().numpy(),
            rows.top_k.cpu().numpy(),
            rows.top_p.cpu().numpy(),
            rows.min_p.cpu().numpy(),
            rows.seed.cpu().numpy().view(np.uint64),
            rows.choice.cpu().numpy(),
            rows.position.cpu().numpy(),
        )
        return sampling.sample(logits.cpu(), batch).to(logits.device)


def _pools(cache: KVCache) -> tuple[Tensor, ...]:
    """Keys and values as numbers."""
    pools = cache.keys, cache.values
    if cache.scales is None:
        return pools
    return tuple(pool * scales[..., None] for pool, scales in zip(pools, cache.scales, strict=True))


def _attend(queries: Tensor, keys: Tensor, values: Tensor, at: Tensor, window: int | None) -> Tensor:
    """Queries [S, T, Q, D] at positions `at` [S, T] over keys and values [K, S, P, D]: [S, T, Q, D]."""
    sequences, rows, heads, head_dim = queries.shape
    kv_heads, _, positions, _ = keys.shape
    grouped = queries.view(sequences, rows, kv_heads, heads // kv_heads, head_dim).float()
    places = torch.arange(positions, device=queries.device)
    seen = places <= at[..., None]
    if window is not None:
        seen = seen & (places > at[..., None] - window)
    scores = torch.einsum("stkgd,kspd->stkgp", grouped, keys.float()) * head_dim**-0.5
    weights = scores.masked_fill(~seen[:, :, None, None], -torch.inf).softmax(-1)
    # What no query of a sequence sees may be anything, even NaN.
    visible = seen.any(1)[None, :, :, None]
    mixed = torch.einsum("stkgp,kspd->stkgd", weights, values.float().masked_fill(~visible, 0.0))
    return mixed.reshape(queries.shape).to(queries.dtype)
