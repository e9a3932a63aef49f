"""Linear layers, norms and the gated activation: everything that works on rows of a matrix.

Invariant of `linear`: every row has the bits that it has in a product of `CANONICAL_ROWS` rows. A library may add up a
product in another order at another number of rows (oneDNN does at one row and many inner features), so other numbers of
rows are used only after a test has shown the same bits; see `same_bits`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROW_TILE = 8
"""Rows come in multiples of this: fewer cost as much, since a product of so few rows waits for the weight."""

CANONICAL_ROWS = 32

_PRODUCT_ROWS = (512, 256, 128, 64, 32, 24, 16, 8)
"""Numbers of rows of one product, tried from the largest. Few, since each is a kernel compiled for every shape."""

_ProductKey = tuple[int, int, torch.Size, torch.dtype, bool, bool]


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """A weight as `linear` reads it."""

    weight: Tensor
    """oneDNN's blocked layout if `packed`, else [out, in]."""
    bias: Tensor | None
    packed: bool


def _packs(dtype: torch.dtype) -> bool:
    """Whether this torch and CPU have oneDNN's prepacked product for `dtype` (float16 needs AVX512-FP16, for one)."""
    if not torch._C._has_mkldnn:
        return False
    probe = torch.zeros(CANONICAL_ROWS, CANONICAL_ROWS, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(probe, CANONICAL_ROWS)
        torch.ops.mkldnn._linear_pointwise(probe, packed, None, "none", [], "")
    except RuntimeError:
        return False
    return True


def prepare_linear(weight: Tensor, bias: Tensor | None) -> ReferenceLinear:
    """Packs the weight for products with few rows, 2 to 3 times faster than a plain one at so few."""
    if weight.device.type == "cpu" and _packs(weight.dtype):
        return ReferenceLinear(torch.ops.mkldnn._reorder_linear_weight(weight, CANONICAL_ROWS), bias, packed=True)
    return ReferenceLinear(weight.contiguous(), bias, packed=False)


def linear(x: Tensor, prepared: ReferenceLinear) -> Tensor:
    """x @ weight.T + bias in as few products as keep every row's bits. Raises ValueError for rows without padding."""
    rows = x.shape[0]
    if rows % ROW_TILE:
        raise ValueError(f"linear takes a multiple of {ROW_TILE} rows, got {rows}")
    products, start = [], 0
    while start < rows:
        size = next((size for size in _PRODUCT_ROWS if size <= rows - start and same_bits(prepared, size)), None)
        if size is None:
            products.append(_canonical(x[start:], prepared))
            break
        products.append(_product(x[start : start + size], prepared))
        start += size
    return products[0] if len(products) == 1 else torch.cat(products)


_tested: dict[_ProductKey, bool] = {}


def same_bits(prepared: ReferenceLinear, rows: int) -> bool:
    """Whether products of `rows` rows give every row the bits that it has in a product of `CANONICAL_ROWS`.

    Tested on random rows the first time that a number of rows meets a shape. The outcome holds for all weights of the
    shape: a library chooses its kernel, and with it the order of the additions, by shape, data type, number of threads
    and processor, never by the numbers. The test is as telling as it has outputs: another order changes most of them in
    float32, but only 1 in 5,000 where they are rounded to bfloat16 (measured at 1,536 features).
    """
    if rows == CANONICAL_ROWS:
        return True
    weight, bias = prepared.weight, prepared.bias
    key = (rows, torch.get_num_threads(), weight.shape, weight.dtype, bias is not None, prepared.packed)
    known = _tested.get(key)
    return _test(key, prepared) if known is None else known


def _test(key: _ProductKey, prepared: ReferenceLinear) -> bool:
    rows, (outer, inner), dtype = key[0], prepared.weight.shape, prepared.weight.dtype
    outputs = 2**14 if dtype.itemsize > 2 else 2**20
    generator = torch.Generator().manual_seed(rows)
    products = -(-min(outputs // outer, 4096) // rows) or 1
    x = torch.randn(products * rows, inner, generator=generator).to(dtype)
    wanted = _canonical(x, prepared)
    equal = torch.equal(torch.cat([_product(part, prepared) for part in torch.split(x, rows)]), wanted)
    # A weight of zeros, say, shows nothing of the order: its outcome is right for itself but not for others.
    if not equal or int(torch.count_nonzero(wanted[1:] != wanted[:-1])) * 2 > wanted.numel():
        _tested[key] = equal
    return equal


def _canonical(x: Tensor, prepared: ReferenceLinear) -> Tensor:
    """Any number of rows, in products of `CANONICAL_ROWS`."""
    rows = x.shape[0]
    full = torch.constant_pad_nd(x, (0, 0, 0, -rows % CANONICAL_ROWS))
    return torch.cat([_product(part, prepared) for part in torch.split(full, CANONICAL_ROWS)])[:rows]


def _product(x: Tensor, prepared: ReferenceLinear) -> Tensor:
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
    divisor = gate.neg().exp_().add_(1.0)
    return torch.div(gate, divisor, out=divisor).mul_(up).to(gate_up.dtype)
