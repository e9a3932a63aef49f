"""The backend in C++: weights in a layout of its own, everything else float32, any number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from worker.kernels.cpu import attention, linear, memory, rows
from worker.kernels.cpu.select import NativeSelection
from worker.kernels.interface import (
    AttentionPlan,
    KVCache,
    LogitEdits,
    Packer,
    PreparedLinear,
    RaggedBatch,
    SamplingBatch,
    StoredPart,
    WeightSpec,
)
from worker.kernels.reference import logits as reference_logits
from worker.kernels.reference import sampling

__all__ = ["CpuKernels"]

_FLOATS: dict[torch.dtype, linear.Format] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class CpuKernels:
    """Implements `worker.kernels.Kernels` for one instruction set. Its threads are those of the native module.

    Edits of single logits are torch's, and so is the arithmetic of a draw, but for what looks at a whole vocabulary and
    for random words.
    """

    name = "cpu"
    device = torch.device("cpu")
    batch_invariant = True
    default_block_size = 16

    def __init__(self, isa: str, native: ModuleType) -> None:
        self._isa, self.native = isa, native
        self._selection = NativeSelection(native)

    @property
    def isa(self) -> str:
        return self._isa

    def activation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Fixed point where products of that take less than floats'."""
        return torch.int16 if self.native.fixed_point and dtype == torch.bfloat16 else dtype

    def packer(self, spec: WeightSpec) -> Packer:
        # One copy serves products and lookups.
        return linear.Packer(self.native, spec.out_features, spec.in_features, spec.quantized or _FLOATS[spec.dtype])

    def pack_stored(self, parts: Sequence[StoredPart]) -> None:
        linear.pack_stored(self.native, parts)

    def nbytes(self, prepared: PreparedLinear) -> int:
        size: int = prepared.nbytes
        return size

    def gather_pages(self, prepared: PreparedLinear) -> bool:
        """See `linear.gather_pages`."""
        return linear.gather_pages(self.native, prepared)

    def populate(self, tensor: Tensor) -> None:
        """See `memory.populate`."""
        memory.populate(self.native, tensor)

    def linear(self, x: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        return linear.linear(self.native, x, prepared, out)

    def gated_linear(self, gate_up: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        return linear.linear(self.native, gate_up, prepared, out, gated=True)

    def embed(self, ids: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        return linear.embed(self.native, ids, prepared, out)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            return rows.rms_norm(self.native, x, weight, eps, out=out)
        return rows.rms_norm(self.native, x, weight, eps, residual, out=x, total=residual)

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
        heads = None if out is None else out.view(out.shape[0], -1, cache.keys.shape[3])
        return rows.rope_and_cache(self.native, qkv, cos, sin, cache, slots, q_norm, k_norm, eps, heads)

    def plan_attention(self, batch: RaggedBatch, kv_heads: int, windows: Sequence[int | None]) -> AttentionPlan:
        return attention.plan_attention(batch)

    def paged_attention(
        self, queries: Tensor, cache: KVCache, plan: AttentionPlan, window: int | None, out: Tensor | None = None
    ) -> Tensor:
        return attention.paged_attention(self.native, queries, cache, plan, window, out)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        return sampling.sample(logits, batch, self._selection)

    def edit_logits(self, logits: Tensor, edits: LogitEdits) -> None:
        reference_logits.edit_logits(logits, edits)

    def logprobs(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return reference_logits.logprobs(logits, tokens, count, self._selection)
