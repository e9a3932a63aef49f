"""`Ops` by our own kernels in Triton."""

from __future__ import annotations

import triton
from torch import Tensor

from worker.kernels.cuda.flash import Paged
from worker.kernels.cuda.ops import SamplingTensors
from worker.kernels.cuda.triton import (
    Codes,
    Draws,
    decode_attention,
    linear,
    ragged_attention,
    rms_norm,
    rope_and_cache,
    sample,
    silu_mul,
)
from worker.kernels.interface import KVCache
from worker.kernels.quantized import QuantizedWeight


class TritonOps:
    """Implements `Ops`.

    Args:
        fixed: whether a row's bits must not depend on the number of rows.
    """

    name = f"Triton {triton.__version__}"

    def __init__(self, *, fixed: bool) -> None:
        self._fixed = fixed

    def linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, out: Tensor | None) -> Tensor:
        return linear(x, Codes.of(weight), bias, out, fixed=self._fixed)

    def sample(self, logits: Tensor, rows: SamplingTensors) -> Tensor:
        draws = Draws(rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed, rows.choice, rows.position)
        return sample(logits, draws, greedy=rows.greedy, filtered=rows.filtered)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, eps, residual)

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
        return rope_and_cache(qkv, cos, sin, cache, slots, q_norm, k_norm, eps, out)

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> Tensor:
        return silu_mul(gate_up, out)

    def decode(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None, out: Tensor) -> Tensor:
        return decode_attention(queries, cache, where.tables, where.key_lengths, where.max_keys, window, out)

    def mixed(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None, out: Tensor) -> Tensor:
        return ragged_attention(queries, cache, where.tables, where.key_lengths, where.query_starts, window, out)
