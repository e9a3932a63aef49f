"""Choosing among a vocabulary's logits: checks and addresses for `native/select.h`.

The order is greater first, equal ones by rising id; -0.0 equals 0.0, and NaN is above everything, as in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor


def _rows(name: str, logits: Tensor) -> tuple[int, int, int]:
    """Address, rows and columns of float32 [S, V]. Raises ValueError."""
    rows, size = logits.shape
    if logits.dtype != torch.float32 or not logits.is_contiguous() or not size:
        raise ValueError(f"{name}: expected contiguous float32 [S, V]")
    return logits.data_ptr(), rows, size


def argmax(native: ModuleType, logits: Tensor) -> Tensor:
    """The first id of each row of float32 [S, V] in order, int64 [S]."""
    address, rows, size = _rows("logits", logits)
    ids = torch.empty(rows, dtype=torch.int64)
    native.argmax(address, rows, size, ids.data_ptr())
    return ids


def top_values(native: ModuleType, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` values of each row of float32 [S, V] in order, and their ids: [S, count] each."""
    address, rows, size = _rows("logits", logits)
    if not 1 <= count <= size:
        raise ValueError(f"count must be in 1 to {size}, got {count}")
    values, ids = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.int64)
    native.top_values(address, rows, size, count, values.data_ptr(), ids.data_ptr())
    return values, ids


def total_mass(native: ModuleType, logits: Tensor, peaks: Tensor) -> Tensor:
    """By row of float32 [S, V], the sum of exp(logit - peak), float64 [S], in an order that V alone fixes."""
    address, rows, size = _rows("logits", logits)
    if peaks.shape != (rows,) or peaks.dtype != torch.float32:
        raise ValueError("peaks: expected float32 [S]")
    masses = torch.empty(rows, dtype=torch.float64)
    peaks = peaks.contiguous()
    native.total_mass(address, peaks.data_ptr(), rows, size, masses.data_ptr())
    return masses


@dataclass(frozen=True, slots=True)
class NativeSelection:
    """Implements `worker.kernels.reference.sampling.Selection` by a module of compiled kernels."""

    native: ModuleType

    def argmax(self, logits: Tensor) -> Tensor:
        return argmax(self.native, logits)

    def top_values(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return top_values(self.native, logits, count)

    def total_mass(self, logits: Tensor, peak: Tensor) -> Tensor:
        return total_mass(self.native, logits, peak)
