"""Choosing among a vocabulary's logits: checks and addresses for `native/select.h`.

The order is greater first, equal ones by rising id; -0.0 equals 0.0, and NaN is above everything, as in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from worker.kernels.reference.sampling import Counters


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


def divide_rows(native: ModuleType, logits: Tensor, rows: Tensor, divisors: Tensor) -> None:
    """Divides the rows `rows` (int64) of float32 [S, V] by float32 `divisors`, in place."""
    address, count, size = _rows("logits", logits)
    if rows.shape != divisors.shape or rows.dtype != torch.int64 or divisors.dtype != torch.float32:
        raise ValueError("rows, divisors: expected int64 and float32 of one length")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise ValueError(f"rows: expected 0 to {count - 1}")
    rows, divisors = rows.contiguous(), divisors.contiguous()
    native.divide_rows(address, size, rows.data_ptr(), divisors.data_ptr(), len(rows))


def philox_words(native: ModuleType, ids: Tensor, rows: Tensor, counters: Counters) -> Tensor:
    """See `Selection.words`; `rows` must be those of the counters, which isn't checked here."""
    tensors = [t.contiguous() for t in (ids, rows, counters.position, counters.choice, counters.seed)]
    if ids.shape != rows.shape or any(t.dtype != torch.int64 or t.dim() != 1 for t in tensors):
        raise ValueError("ids, rows and counters: expected int64 of one dimension, as many rows as ids")
    words = torch.empty_like(tensors[0])
    candidates, *numbers = (t.data_ptr() for t in tensors)
    native.philox_words(candidates, numbers[0], len(ids), *numbers[1:], words.data_ptr())
    return words


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

    def divide(self, logits: Tensor, rows: Tensor, divisors: Tensor) -> None:
        divide_rows(self.native, logits, rows, divisors)

    def words(self, ids: Tensor, rows: Tensor, counters: Counters) -> Tensor:
        return philox_words(self.native, ids, rows, counters)
