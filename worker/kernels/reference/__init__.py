"""The reference backend: plain torch on the CPU, and the oracle for the others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from worker.kernels.interface import AttentionPlan, KVCache, LogitEdits, PreparedLinear, RaggedBatch, SamplingBatch
from worker.kernels.reference import attention, dense, rope, sampling
from worker.kernels.reference import logits as logits_

__all__ = ["ReferenceKernels"]


class ReferenceKernels:
    """Implements `worker.kernels.Kernels`; stateless."""

    row_tile = dense.ROW_TILE

    def prepare_linear(self, weight: Tensor, bias: Tensor | None) -> PreparedLinear:
        return dense.prepare_linear(weight, bias)

    def linear(self, x: Tensor, prepared: PreparedLinear) -> Tensor:
        return dense.linear(x, prepared)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
    ) -> Tensor:
        return rope.rope_and_cache(qkv, cos, sin, cache, slots, q_norm, k_norm, eps)

    def plan_attention(self, batch: RaggedBatch, kv_heads: int, windows: Sequence[int | None]) -> AttentionPlan:
        return attention.plan_attention(batch, kv_heads, windows)

    def paged_attention(self, queries: Tensor, cache: KVCache, plan: AttentionPlan, window: int | None) -> Tensor:
        return attention.paged_attention(queries, cache, plan, window)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return dense.silu_mul(gate_up)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        return sampling.sample(logits, batch)

    def edit_logits(self, logits: Tensor, edits: LogitEdits) -> None:
        logits_.edit_logits(logits, edits)

    def logprobs(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return logits_.logprobs(logits, tokens, count)
