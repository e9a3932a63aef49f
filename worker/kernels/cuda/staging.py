"""Copies between host and GPU that neither waits for.

Invariant: pinned memory is not written again before the GPU has copied what was there. Buffers are used in turn, each
with a mark behind its last copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.kernels.cuda.device import Device, Mark

BUFFERS = 4
_ALIGNMENT = 16
_LEAST_BYTES = 1 << 16


class Staging:
    """Pinned buffers that grow to the largest copy that came up."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: list[Tensor | None] = [None] * BUFFERS
        self._marks: list[Mark | None] = [None] * BUFFERS
        self._turn = 0

    def upload(self, *arrays: npt.NDArray[Any]) -> list[Tensor]:
        """Arrays as tensors on the GPU, by one copy; of the same shapes and types."""
        offsets, total = _layout([array.nbytes for array in arrays])
        pinned = self._next(total)
        host = pinned.numpy()
        for array, offset in zip(arrays, offsets, strict=True):
            if array.nbytes:
                host[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        on_device = torch.empty(total, dtype=torch.uint8, device=self._device.torch)
        on_device.copy_(pinned[:total], non_blocking=True)
        self._done()
        return [
            on_device[offset : offset + array.nbytes].view(_TYPES[array.dtype]).view(array.shape)
            for array, offset in zip(arrays, offsets, strict=True)
        ]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """A host tensor into one on the GPU of its shape and type. `source` may be overwritten afterwards."""
        data = source.contiguous().view(-1).view(torch.uint8)
        pinned = self._next(data.numel())[: data.numel()]
        pinned.copy_(data)
        target.copy_(pinned.view(source.dtype).view(source.shape), non_blocking=True)
        self._done()

    def _next(self, nbytes: int) -> Tensor:
        """A buffer that the GPU is done with."""
        mark = self._marks[self._turn]
        if mark is not None:
            mark.wait()
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._device.pinned(max(_LEAST_BYTES, 1 << (nbytes - 1).bit_length()))
            self._buffers[self._turn] = buffer
        return buffer

    def _done(self) -> None:
        self._marks[self._turn] = self._device.mark()
        self._turn = (self._turn + 1) % BUFFERS


class Download:
    """Tensors on their way to the host. The GPU goes on with other work meanwhile."""

    def __init__(self, device: Device, tensors: Sequence[Tensor]) -> None:
        self._tensors = []
        for tensor in tensors:
            host = device.pinned(tensor.numel() * tensor.dtype.itemsize)
            host = host.view(tensor.dtype).view(tensor.shape)
            host.copy_(tensor, non_blocking=True)
            self._tensors.append(host)
        self._mark = device.mark()

    def wait(self) -> list[Tensor]:
        """The same tensors on the host."""
        self._mark.wait()
        return self._tensors


_TYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.bool_): torch.bool,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Offsets of pieces of these sizes, and the size of all."""
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, max(total, _ALIGNMENT)
