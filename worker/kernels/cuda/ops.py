"""What the backend takes from our own Triton kernels; tests bring others in plain torch.

Shapes are those of `worker.kernels.interface`; tensors lie on one GPU, and nothing here waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from worker.kernels.cuda.flash import Paged
from worker.kernels.interface import KVCache
from worker.kernels.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """A `SamplingBatch` on the GPU: all [S]."""

    temperature: Tensor
    """float32."""
    top_k: Tensor
    """int64."""
    top_p: Tensor
    """float64, as is `min_p`."""
    min_p: Tensor
    seed: Tensor
    """int64 with the bits of the unsigned number."""
    choice: Tensor
    """int64, as is `position`."""
    position: Tensor
    greedy: bool
    """Whether every temperature is 0."""
    filtered: bool
    """Whether any row has top-k, top-p or min-p."""


class Ops(Protocol):
    """See `worker.kernels.Kernels` for what each computes."""

    @property
    def name(self) -> str:
        """What results' bits depend on: Triton and its version."""
        ...

    def linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, out: Tensor | None) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]: ...

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
    ) -> Tensor: ...

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> Tensor: ...

    def decode(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None, out: Tensor) -> Tensor:
        """Attention of one query for each sequence, [sequences, Q, D]."""
        ...

    def mixed(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None, out: Tensor) -> Tensor:
        """Attention of chunks of any lengths, [rows, Q, D]; the same bits for a query whatever its chunk."""
        ...

    def sample(self, logits: Tensor, rows: SamplingTensors) -> Tensor: ...
