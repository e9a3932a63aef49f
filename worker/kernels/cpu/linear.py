"""Linear layers on compiled kernels: weights packed once, then products with any number of rows.

`module` is a module of compiled kernels from `worker.kernels.cpu.native.load`; a packed weight goes back to the module
that packed it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from worker.kernels import quantized
from worker.kernels.cpu.memory import zeros
from worker.kernels.interface import PACK_ROWS, StoredError, StoredPart
from worker.kernels.quantized import QuantizedWeight

Format: TypeAlias = Literal["float32", "bfloat16", "float16", "int8", "int4"]

_CODES: dict[Format, int] = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}
"""As in native/linear.h."""
_FLOATS: dict[torch.dtype, Format] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_STORED: dict[Format, tuple[torch.dtype, int]] = {"int8": (torch.int8, 2), "int4": (torch.uint8, 3)}
"""The numbers of a stored weight that isn't floats, and how many tensors it takes: q, scale and, with int4, zero."""
_CHUNK_WEIGHTS = 2**23
"""Weights that `pack` hands on at a time, so that conversions need little memory."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A weight [N, K] in panels of 32 output channels, as the kernels read it, and its bias."""

    out_features: int
    in_features: int
    format: Format
    data: Tensor
    """uint8 [bytes]."""
    bias: Tensor | None
    """float32 [N]."""
    code: int
    address: int
    bias_address: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.bias is None else self.bias.nbytes)


class Packer:
    """Packs a weight slice by slice, as a loader reads it; slices may come in any order, each row once."""

    def __init__(self, module: ModuleType, out_features: int, in_features: int, format: Format) -> None:  # noqa: A002
        if out_features < 1 or in_features < 1:
            raise ValueError(f"a weight needs rows and columns, got [{out_features}, {in_features}]")
        self._module, self._out, self._in, self._format = module, out_features, in_features, format
        self._data = zeros(module.packed_bytes(_CODES[format], out_features, in_features), large=True)

    def put(self, first_row: int, rows: Tensor | QuantizedWeight) -> None:
        """Packs [n, K] as rows from `first_row` on; floats are converted or quantized to the packer's format."""
        count = rows.out_features if isinstance(rows, QuantizedWeight) else rows.shape[0]
        width = rows.in_features if isinstance(rows, QuantizedWeight) else rows.shape[1]
        if width != self._in or first_row < 0 or first_row + count > self._out:
            raise ValueError(
                f"rows {first_row} to {first_row + count} of {width} don't fit a weight [{self._out}, {self._in}]"
            )
        if self._format == "int8" or self._format == "int4":
            if not isinstance(rows, QuantizedWeight):
                rows = quantized.quantize(rows, self._format)
            self._put_quantized(first_row, rows)
        elif isinstance(rows, QuantizedWeight):
            raise ValueError(f"{rows.format} rows don't fit a {self._format} weight")
        else:
            rows = rows.contiguous()
            self._module.pack_floats(
                _CODES[self._format],
                self._data.data_ptr(),
                self._in,
                first_row,
                count,
                _CODES[_FLOATS[rows.dtype]],
                rows.data_ptr(),
            )

    def _put_quantized(self, first_row: int, rows: QuantizedWeight) -> None:
        if rows.format != self._format:
            raise ValueError(f"{rows.format} rows don't fit a {self._format} weight")
        tensors = [t.contiguous() for t in (rows.q, rows.scale, rows.zero) if t is not None]
        pack = self._module.pack_int8 if rows.format == "int8" else self._module.pack_int4
        addresses = [t.data_ptr() for t in tensors]
        pack(self._data.data_ptr(), self._in, first_row, rows.out_features, *addresses)

    def finish(self, bias: Tensor | None = None) -> PackedLinear:
        """The packed weight. The packer may not be used again."""
        if bias is not None:
            if bias.shape != (self._out,):
                raise ValueError(f"a bias [{self._out}] is needed, got {list(bias.shape)}")
            bias = bias.detach().to(torch.float32).contiguous()
        return PackedLinear(
            self._out,
            self._in,
            self._format,
            self._data,
            bias,
            _CODES[self._format],
            self._data.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )


def pack_stored(module: ModuleType, parts: Sequence[StoredPart]) -> None:
    """Reads and packs parts of weights whose packers have finished. Raises StoredError."""
    given = []
    for part in parts:
        packed: PackedLinear = part.prepared
        end = part.first_row + part.rows
        if part.first_row % PACK_ROWS or not 0 <= part.first_row < end <= packed.out_features:
            raise ValueError(f"rows {part.first_row} to {end} of {packed.out_features}")
        if part.rows % PACK_ROWS and end < packed.out_features:
            raise ValueError(f"{part.rows} rows: others may share their last panel")
        few = _STORED.get(packed.format)
        fits = (part.dtype, len(part.places)) == few if few else part.dtype in _FLOATS and len(part.places) == 1
        if not fits:
            raise ValueError(f"{len(part.places)} tensors of {part.dtype} don't fit a {packed.format} weight")
        source = _CODES[_FLOATS.get(part.dtype, packed.format)]
        given.append(
            (packed.code, packed.address, packed.in_features, part.first_row, part.rows, source, list(part.places))
        )
    failure = module.pack_stored(given)
    if failure is not None:
        index, place, error = failure
        raise StoredError(index, place, os.strerror(error) if error else "")


def pack(module: ModuleType, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> PackedLinear:
    """Packs a weight [N, K] in its own format."""
    if isinstance(weight, QuantizedWeight):
        packer = Packer(module, weight.out_features, weight.in_features, weight.format)
        packer.put(0, weight)
        return packer.finish(bias)
    packer = Packer(module, weight.shape[0], weight.shape[1], _FLOATS[weight.dtype])
    step = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        packer.put(first, weight[first : first + step])
    return packer.finish(bias)


def gather_pages(module: ModuleType, packed: PackedLinear) -> bool:
    """Has the system move the weight into large pages, some milliseconds for each 2 MiB; products may run meanwhile.
    Returns whether it can: Linux from 6.1 on, if large pages are not off."""
    done: bool = module.gather_pages(packed.address, packed.data.nbytes)
    return done


def linear(
    module: ModuleType, x: Tensor, packed: PackedLinear, out: Tensor | None = None, gated: bool = False
) -> Tensor:
    """float32 [T, K] to float32 [T, N]: x @ weight.T + bias. A row's bits depend on that row alone.

    The last dimension of `x` and `out` must be dense; rows may be apart. With int8 and int4 weights, each row of `x` is
    quantized to 8 bits, with a scale for every 128 values. `gated`: x is [T, 2 * K], gate then up, and silu(gate) * up
    meets the weight.
    """
    rows, width = x.shape
    wanted = packed.in_features * (2 if gated else 1)
    if width != wanted or x.dtype != torch.float32 or x.stride(1) != 1:
        raise ValueError(f"linear takes float32 rows of {wanted}, got {x.dtype} {list(x.shape)}")
    if out is None:
        out = torch.empty(rows, packed.out_features)
    elif out.shape != (rows, packed.out_features) or out.dtype != torch.float32 or out.stride(1) != 1:
        raise ValueError(f"out must be float32 [{rows}, {packed.out_features}], got {out.dtype} {list(out.shape)}")
    module.linear(
        packed.code,
        packed.address,
        packed.out_features,
        packed.in_features,
        packed.bias_address,
        rows,
        x.data_ptr(),
        x.stride(0),
        gated,
        out.data_ptr(),
        out.stride(0),
    )
    return out


def embed(module: ModuleType, ids: Tensor, packed: PackedLinear, out: Tensor | None = None) -> Tensor:
    """Rows `ids` (int64 [T]) of the weight, float32 [T, K]. Raises IndexError for an id that it doesn't have."""
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"embed takes int64 [T], got {ids.dtype} {list(ids.shape)}")
    ids = ids.contiguous()
    if out is None:
        out = torch.empty(ids.shape[0], packed.in_features)
    elif out.shape != (ids.shape[0], packed.in_features) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous float32 {[ids.shape[0], packed.in_features]}")
    module.embed(
        packed.code,
        packed.address,
        packed.out_features,
        packed.in_features,
        ids.shape[0],
        ids.data_ptr(),
        out.data_ptr(),
    )
    return out
