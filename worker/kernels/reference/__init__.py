"""The reference backend: plain torch on the CPU, and the oracle for the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.kernels.interface import (
    AttentionPlan,
    KVCache,
    LogitEdits,
    Packer,
    PreparedLinear,
    RaggedBatch,
    SamplingBatch,
    WeightSpec,
)
from worker.kernels.reference import attention, dense, rope, sampling
from worker.kernels.reference import logits as logits_

__all__ = ["ReferenceKernels"]


class ReferenceKernels:
    """Implements `worker.kernels.Kernels`; stateless. Activations have the dtype that weights are kept in.

    Quantized weights are kept as the floating-point values that they stand for.
    """

    name = "reference"
    device = torch.device("cpu")
    batch_invariant = True
    default_block_size = 16

    @property
    def isa(self) -> str:
        return torch.backends.cpu.get_cpu_capability()

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def activation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def packer(self, spec: WeightSpec) -> Packer:
        return dense.ReferencePacker(spec)

    def nbytes(self, prepared: PreparedLinear) -> int:
        return dense.nbytes(prepared)

    def linear(self, x: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        return dense.linear(x, prepared)

    def gated_linear(self, gate_up: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        return dense.linear(dense.silu_mul(gate_up), prepared)

    def embed(self, ids: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        return dense.embed(ids, prepared)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
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
        out: Tensor | None = None,
    ) -> Tensor:
        return rope.rope_and_cache(qkv, cos, sin, cache, slots, q_norm, k_norm, eps)

    def plan_attention(self, batch: RaggedBatch, kv_heads: int, windows: Sequence[int | None]) -> AttentionPlan:
        return attention.plan_attention(batch, kv_heads, windows)

    def paged_attention(
        self, queries: Tensor, cache: KVCache, plan: AttentionPlan, window: int | None, out: Tensor | None = None
    ) -> Tensor:
        return attention.paged_attention(queries, cache, plan, window)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 * N], gate then up, to silu(gate) * up, [T, N]."""
        return dense.silu_mul(gate_up)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        return sampling.sample(logits, batch)

    def edit_logits(self, logits: Tensor, edits: LogitEdits) -> None:
        logits_.edit_logits(logits, edits)

    def logprobs(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return logits_.logprobs(logits, tokens, count)
