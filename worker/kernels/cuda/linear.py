"""Weights on the GPU: streamed there by slices, and multiplied by cuBLAS, or where they are quantized by Triton.

cuBLAS chooses its kernel, and with it the order of a sum, by the number of rows, so a row's bits follow its batch.
`fixed_rows` makes every product one of `FIXED_ROWS` rows: then they don't. So many rows cost a decode little, whose
products wait for the weights anyway; a prefill reads each weight more often than it would have to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.kernels.cuda.staging import Staging
from worker.kernels.interface import WeightSpec
from worker.kernels.quantized import QuantizedWeight, dequantize, groups, quantize

FIXED_ROWS = 128


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A weight of 16 or 32 bits, [out, in]."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A weight of few bits, as `QuantizedWeight` has it."""

    weight: QuantizedWeight
    bias: Tensor | None
    dtype: torch.dtype
    """Of activations."""


CudaLinear = DenseLinear | QuantizedLinear


class CudaPacker:
    """Implements `worker.kernels.Packer`: no row is in host memory longer than its copy takes."""

    def __init__(self, spec: WeightSpec, staging: Staging, device: torch.device) -> None:
        self._spec, self._staging, self._device = spec, staging, device
        self._dense: Tensor | None = None
        self._quantized: QuantizedWeight | None = None
        rows, columns = spec.out_features, spec.in_features
        if spec.quantized is None:
            self._dense = torch.empty(rows, columns, dtype=spec.dtype, device=device)
            return
        wide = spec.quantized == "int8"
        packed, kind = (columns, torch.int8) if wide else (-(-columns // 2), torch.uint8)
        q = torch.empty(rows, packed, dtype=kind, device=device)
        scale = torch.empty(rows, groups(spec.quantized, columns), dtype=torch.bfloat16, device=device)
        zero = None if wide else torch.empty(scale.shape, dtype=torch.uint8, device=device)
        self._quantized = QuantizedWeight(spec.quantized, columns, q, scale, zero)

    def put(self, row: int, rows: Tensor | QuantizedWeight) -> None:
        if self._dense is not None:
            if isinstance(rows, QuantizedWeight):
                raise ValueError(f"{rows.format} rows don't fit a weight of {self._dense.dtype}")
            self._staging.copy(rows.to(self._dense.dtype), self._dense[row : row + rows.shape[0]])
            return
        target = self._quantized
        if target is None:
            raise RuntimeError("the packer was used after it was finished")
        if isinstance(rows, Tensor):
            rows = quantize(rows, target.format)
        if rows.format != target.format:
            raise ValueError(f"{rows.format} rows don't fit a weight of {target.format}")
        part = target.rows(row, row + rows.out_features)
        for source, to in ((rows.q, part.q), (rows.scale, part.scale), (rows.zero, part.zero)):
            if source is not None and to is not None:
                self._staging.copy(source, to)

    def finish(self, bias: Tensor | None) -> CudaLinear:
        bias = None if bias is None else bias.to(self._device)
        if self._dense is not None:
            return DenseLinear(self._dense, bias)
        if self._quantized is None:
            raise RuntimeError("the packer was finished twice")
        return QuantizedLinear(self._quantized, bias, self._spec.dtype)


def nbytes(prepared: CudaLinear) -> int:
    """See `Kernels.nbytes`."""
    if isinstance(prepared, DenseLinear):
        return prepared.weight.nbytes
    weight = prepared.weight
    return weight.q.nbytes + weight.scale.nbytes + (0 if weight.zero is None else weight.zero.nbytes)


def dense(x: Tensor, prepared: DenseLinear, out: Tensor | None, *, fixed_rows: bool) -> Tensor:
    """x @ weight.T + bias, in one product, or in products of `FIXED_ROWS` rows."""
    if not fixed_rows:
        return _product(x, prepared, out)
    rows = x.shape[0]
    full = x if rows % FIXED_ROWS == 0 else torch.constant_pad_nd(x, (0, 0, 0, -rows % FIXED_ROWS))
    products = [_product(part, prepared, None) for part in torch.split(full, FIXED_ROWS)]
    whole = products[0] if len(products) == 1 else torch.cat(products)
    if out is None:
        return whole[:rows]
    return out.copy_(whole[:rows])


def _product(x: Tensor, prepared: DenseLinear, out: Tensor | None) -> Tensor:
    weight = prepared.weight.t()
    if prepared.bias is None:
        return torch.mm(x, weight) if out is None else torch.mm(x, weight, out=out)
    if out is None:
        return torch.addmm(prepared.bias, x, weight)
    return torch.addmm(prepared.bias, x, weight, out=out)


def embed(ids: Tensor, prepared: CudaLinear) -> Tensor:
    """See `Kernels.embed`."""
    if isinstance(prepared, DenseLinear):
        return torch.embedding(prepared.weight, ids)
    weight = prepared.weight
    zero = None if weight.zero is None else weight.zero[ids]
    rows = QuantizedWeight(weight.format, weight.in_features, weight.q[ids], weight.scale[ids], zero)
    return dequantize(rows).to(prepared.dtype)
