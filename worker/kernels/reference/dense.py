"""Linear layers, norms and the gated activation: everything that works on rows of a matrix.

Invariant of `linear`: every row has the bits that it has in a product of `CANONICAL_ROWS` rows. A library may add up a
product in another order at another number of rows (oneDNN does at one row and many inner features), so other numbers of
rows are used only after a test has shown the same bits; see `same_bits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from worker.kernels.interface import WeightSpec
from worker.kernels.quantized import QuantizedWeight, dequantize, quantize

CANONICAL_ROWS = 32

_FEW_ROWS = (1, 2, 4, 8, 16, 24, CANONICAL_ROWS)
_MANY_ROWS = (512, 256, 128, 64, CANONICAL_ROWS)
"""Numbers of rows of one product. Not more of them, since each is a kernel compiled for every shape."""

_ProductKey = tuple[int, int, torch.Size, torch.dtype, bool, bool]


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """A weight as `linear` and `embed` read it."""

    table: Tensor | None
    """[out, in], where rows are looked up."""
    weight: Tensor | None
    """oneDNN's blocked layout if `packed`, else [out, in]; None where there are no products."""
    bias: Tensor | None
    packed: bool

    def multiplied(self) -> Tensor:
        """The weight of products. Raises ValueError where it was not packed for any."""
        if self.weight is None:
            raise ValueError("this weight was not packed for products")
        return self.weight


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
        """Packs the weight for products with few rows, 2 to 3 times faster than a plain one at so few."""
        weight = self._weight
        table = weight if self._spec.looked_up else None
        if not self._spec.multiplied:
            return ReferenceLinear(table, None, bias, packed=False)
        if _packs(weight.dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, CANONICAL_ROWS)
            return ReferenceLinear(table, packed, bias, packed=True)
        return ReferenceLinear(table, weight, bias, packed=False)


@cache
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


def embed(ids: Tensor, prepared: ReferenceLinear) -> Tensor:
    """See `Kernels.embed`."""
    if prepared.table is None:
        raise ValueError("this weight was not packed to be looked up")
    return torch.embedding(prepared.table, ids)


def nbytes(prepared: ReferenceLinear) -> int:
    """See `Kernels.nbytes`."""
    return 0 if prepared.weight is None else prepared.weight.numel() * prepared.weight.dtype.itemsize


def linear(x: Tensor, prepared: ReferenceLinear) -> Tensor:
    """x @ weight.T + bias in as few products as keep every row's bits."""
    products, start = [], 0
    while start < x.shape[0]:
        rows = _product_rows(prepared, x.shape[0] - start)
        products.append(_padded_product(x[start : start + rows], prepared, rows))
        start += rows
    return products[0] if len(products) == 1 else torch.cat(products)


def _product_rows(prepared: ReferenceLinear, left: int) -> int:
    """How many rows the next product has: the fewest that hold all that are left, or else as many as there are."""
    if left <= CANONICAL_ROWS:
        return next(rows for rows in _FEW_ROWS if rows >= left and same_bits(prepared, rows))
    return next(rows for rows in _MANY_ROWS if rows <= left and same_bits(prepared, rows))


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
    weight, bias = prepared.multiplied(), prepared.bias
    key = (rows, torch.get_num_threads(), weight.shape, weight.dtype, bias is not None, prepared.packed)
    known = _tested.get(key)
    return _test(key, prepared) if known is None else known


def _test(key: _ProductKey, prepared: ReferenceLinear) -> bool:
    weight = prepared.multiplied()
    rows, (outer, inner), dtype = key[0], weight.shape, weight.dtype
    outputs = 2**14 if dtype.itemsize > 2 else 2**20
    generator = torch.Generator().manual_seed(rows)
    products = -(-max(2, min(outputs // outer, 4096)) // rows)
    x = torch.randn(products * rows, inner, generator=generator).to(dtype)
    wanted = _canonical(x, prepared)
    equal = torch.equal(torch.cat([_product(part, prepared) for part in torch.split(x, rows)]), wanted)
    # A weight of zeros, say, shows nothing of the order: its outcome is right for itself but not for others.
    if not equal or int(torch.count_nonzero(wanted[1:] != wanted[:-1])) * 2 > wanted[1:].numel():
        _tested[key] = equal
    return equal


def _canonical(x: Tensor, prepared: ReferenceLinear) -> Tensor:
    """Any number of rows, in products of `CANONICAL_ROWS`."""
    return torch.cat([_padded_product(part, prepared, CANONICAL_ROWS) for part in torch.split(x, CANONICAL_ROWS)])


def _padded_product(x: Tensor, prepared: ReferenceLinear, rows: int) -> Tensor:
    """`x` in a product of `rows` rows, the missing ones zeros."""
    count = x.shape[0]
    if count == rows:
        return _product(x, prepared)
    return _product(torch.constant_pad_nd(x, (0, 0, 0, rows - count)), prepared)[:count]


def _product(x: Tensor, prepared: ReferenceLinear) -> Tensor:
    weight = prepared.multiplied()
    if prepared.packed:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, prepared.bias, "none", [], "")
        return out
    out = torch.mm(x, weight.t())
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
