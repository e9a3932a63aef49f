"""Linear layers, norms and the gated activation: everything that works on rows of a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from worker.kernels.interface import WeightSpec
from worker.kernels.quantized import QuantizedWeight, dequantize, quantize

ROW_TILE = 32
"""A matrix product over a fixed number of rows has bits that do not depend on the batch; a product over one row would
not be bit-equal to the same row among 32."""


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """A weight as `linear` and `embed` read it."""

    table: Tensor | None
    """[out, in], where rows are looked up."""
    weight: Tensor | None
    """oneDNN's blocked layout if `packed`, else [out, in]; None where there are no products."""
    bias: Tensor | None
    packed: bool


class ReferencePacker:
    """Implements `worker.kernels.Packer`."""

    def __init__(self, spec: WeightSpec) -> None:
        self._spec = spec
        self._weight = torch.empty(spec.out_features, spec.in_features, dtype=spec.dtype)

    def put(self, row: int, rows: Tensor | QuantizedWeight) -> None:
        if self._spec.quantized and isinstance(rows, Tensor):
            rows = quantize(rows, self._spec.quantized)
        if isinstance(rows, QuantizedWeight):
            rows = dequantize(rows)
        self._weight[row : row + rows.shape[0]] = rows

    def finish(self, bias: Tensor | None) -> ReferenceLinear:
        """Packs the weight for products with `ROW_TILE` rows, 2 to 3 times faster than a plain one at so few rows."""
        weight = self._weight
        table = weight if self._spec.looked_up else None
        if not self._spec.multiplied:
            return ReferenceLinear(table, None, bias, packed=False)
        if _packs(weight.dtype):
            return ReferenceLinear(table, torch.ops.mkldnn._reorder_linear_weight(weight, ROW_TILE), bias, packed=True)
        return ReferenceLinear(table, weight, bias, packed=False)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this torch and CPU have oneDNN's prepacked product for `dtype` (float16 needs AVX512-FP16, for one)."""
    if not torch._C._has_mkldnn:
        return False
    probe = torch.zeros(ROW_TILE, ROW_TILE, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(probe, ROW_TILE)
        torch.ops.mkldnn._linear_pointwise(probe, packed, None, "none", [], "")
    except RuntimeError:
        return False
    return True


def embed(ids: Tensor, prepared: ReferenceLinear) -> Tensor:
    """See `Kernels.embed`."""
    if prepared.table is None:
        raise ValueError("this weight was not packed to be looked up")
    return torch.embedding(prepared.table, ids)


def nbytes(prepared: ReferenceLinear) -> int:
    """See `Kernels.nbytes`."""
    return 0 if prepared.weight is None else prepared.weight.numel() * prepared.weight.dtype.itemsize


def linear(x: Tensor, prepared: ReferenceLinear) -> Tensor:
    """One product per 32 rows, so that every row meets the same blocking whatever the batch."""
    if x.shape[0] % ROW_TILE:
        raise ValueError(f"linear takes a multiple of {ROW_TILE} rows, got {x.shape[0]}")
    tiles = [_tile(tile, prepared) for tile in torch.split(x, ROW_TILE)]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)


def _tile(x: Tensor, prepared: ReferenceLinear) -> Tensor:
    if prepared.weight is None:
        raise ValueError("this weight was not packed for products")
    if prepared.packed:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, prepared.weight, prepared.bias, "none", [], "")
        return out
    out = torch.mm(x, prepared.weight.t())
    return out if prepared.bias is None else out + prepared.bias


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Root mean square norm over the last dimension (Zhang and Sennrich, 2019), in float32; see `Kernels.rms_norm`."""
    if residual is not None:
        x = x + residual
    wide = x.to(torch.float32)
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), x


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in float32, rounded once.

    Written out because torch's silu takes another path for the last few elements of a tensor, which may differ in the
    last bit; exp does not.
    """
    gate, up = gate_up.to(torch.float32).chunk(2, dim=-1)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(gate_up.dtype)
