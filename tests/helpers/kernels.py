"""Weights for kernels under test."""

from __future__ import annotations

from torch import Tensor

from worker.kernels import Kernels, PreparedLinear, WeightSpec
from worker.kernels.quantized import Format


def pack(
    kernels: Kernels,
    weight: Tensor,
    bias: Tensor | None = None,
    quantized: Format | None = None,
    looked_up: bool = False,
) -> PreparedLinear:
    """A whole weight [out, in] in a backend's layout."""
    rows, columns = weight.shape
    packer = kernels.packer(WeightSpec(rows, columns, weight.dtype, quantized, looked_up=looked_up))
    packer.put(0, weight)
    return packer.finish(bias)
