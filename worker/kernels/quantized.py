"""Weights of few bits, row-major and the same on every machine: what `--quantize` makes and a checkpoint stores.

Both formats cut each output channel's weights into groups along the input, with one scale a group, so that a row's own
outliers cost only their neighbours precision:

    int8   weight = scale * q, q in [-127, 127], groups of 128: 8.125 bits a weight
    int4   weight = scale * (q - (36 + 3 * zero) / 8), q and zero in [0, 15], groups of 32: 4.5 bits

An int4 scale keeps 3 bits of mantissa, which leaves the low 4 of its 16 for the zero point in a packed weight; a search
for the pair with the least squared error makes up for more than the bits are worth. Zero points lie in steps of 3/8
about the middle of q's range, as far off it as groups of Gaussian weights need.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.kernels.names import Format as Format

GROUP: dict[Format, int] = {"int8": 128, "int4": 32}
"""Weights along the input that share a scale; a row's last group may have fewer."""

_WEIGHTS_AT_ONCE = 2**15 - 1
"""Weights that a thread quantizes at a time: what the search needs stays in its caches, and torch, which shares out
work from 2**15 elements on, starts no threads for it."""
ZERO_BASE, ZERO_STEP = 36 / 8, 3 / 8
_MANTISSA = 20
"""Bits of a float32 below those that an int4 scale keeps."""
_TINY = 2.0**-100
"""The least scale: a group of smaller weights than this could show is zeros, and no scale is a subnormal number."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [N, K] of a linear layer; G groups a row."""

    format: Format
    in_features: int
    q: Tensor
    """int8: int8 [N, K]. int4: uint8 [N, ceil(K / 2)], value 2i in the low half of byte i."""
    scale: Tensor
    """bfloat16 [N, G]."""
    zero: Tensor | None = None
    """int4 only: uint8 [N, G]."""

    @property
    def out_features(self) -> int:
        return self.q.shape[0]

    def rows(self, first: int, last: int) -> QuantizedWeight:
        """Output channels [first, last), without a copy."""
        zero = None if self.zero is None else self.zero[first:last]
        return QuantizedWeight(self.format, self.in_features, self.q[first:last], self.scale[first:last], zero)


def groups(format: Format, in_features: int) -> int:  # noqa: A002
    """Groups of a row."""
    return -(-in_features // GROUP[format])


def bits_per_weight(format: Format) -> float:  # noqa: A002
    """Bits that a packed weight takes, scales and zero points counted."""
    return {"int8": 8, "int4": 4}[format] + 16 / GROUP[format]


def quantize(weight: Tensor, format: Format) -> QuantizedWeight:  # noqa: A002
    """Quantizes a weight [N, K] of any float dtype. Every row on its own, so slices of rows quantize to slices."""
    one = {"int8": _int8, "int4": _int4}[format]
    parts = torch.split(weight, max(1, _WEIGHTS_AT_ONCE // weight.shape[1]))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        made = list(threads.map(one, parts))
    q, scale, zero = (torch.cat(tensors) for tensors in zip(*made, strict=True))
    return QuantizedWeight(format, weight.shape[1], q, scale, zero if format == "int4" else None)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The weight as float32 [N, K]."""
    size = GROUP[weight.format]
    scale = weight.scale.to(torch.float32).repeat_interleave(size, 1)[:, : weight.in_features]
    if weight.zero is None:
        return weight.q * scale
    q = torch.stack((weight.q & 15, weight.q >> 4), -1).flatten(1)[:, : weight.in_features]
    zero = weight.zero.repeat_interleave(size, 1)[:, : weight.in_features]
    return scale * (q - (ZERO_BASE + ZERO_STEP * zero))


def _grouped(weight: Tensor, size: int) -> Tensor:
    """[N, K] as float32 [N, G, size], the last group filled up with its own last weight, which changes no extreme."""
    rest = -weight.shape[1] % size
    wide = weight.to(torch.float32)
    if rest:
        wide = torch.cat((wide, wide[:, -1:].expand(-1, rest)), 1)
    return wide.view(weight.shape[0], -1, size)


def _int8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = _grouped(weight, GROUP["int8"])
    scale = (wide.abs().amax(-1) / 127).clamp(min=_TINY).to(torch.bfloat16)
    q = (wide / scale.to(torch.float32)[..., None]).round_().clamp_(-127, 127).to(torch.int8)
    return q.flatten(1)[:, : weight.shape[1]].contiguous(), scale, torch.empty(0)


def _int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero, offset = int4_parameters(weight)
    wide = _grouped(weight, GROUP["int4"])
    q = (wide / scale[..., None]).add_(offset[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    return pack_int4(q.flatten(1)[:, : weight.shape[1]]), scale.to(torch.bfloat16), zero.to(torch.uint8)


def pack_int4(q: Tensor) -> Tensor:
    """Values of 0 to 15, uint8 [N, K], as a weight stores them."""
    q = torch.nn.functional.pad(q, (0, q.shape[1] % 2))
    return q[:, ::2] | q[:, 1::2] << 4


def int4_parameters(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Each group's scale, zero point and offset (what stands for 0, in steps), float32 [N, G]: a search for the least
    squared error, each input feature's counted `importance` [K] times.
    """
    wide = _grouped(weight, GROUP["int4"])
    counts = None if importance is None else _grouped(importance[None], GROUP["int4"])
    low, high = wide.aminmax(dim=-1, keepdim=True)
    middle = (low + high) / 2
    # The scale that spans the group's values, with zero points as far off the middle as they go; then its leading bits.
    span = torch.stack(((high - low) / 15, high / (15 - ZERO_BASE), -low / (ZERO_BASE + 15 * ZERO_STEP))).amax(0)
    span.clamp_(min=_TINY)
    count = span.view(torch.int32) >> _MANTISSA
    least = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.empty_like(low), torch.empty_like(low)
    scaled, shifted, rounded = (torch.empty_like(wide) for _ in range(3))
    for step in (-1, 0, 1):
        scale = ((count + step) << _MANTISSA).view(torch.float32)
        torch.div(wide, scale, out=scaled)
        near = ((7.5 - ZERO_BASE - middle / scale) / ZERO_STEP).round()
        for offset in (-1, 0, 1):
            zero = (near + offset).clamp(0, 15)
            torch.add(scaled, ZERO_BASE + ZERO_STEP * zero, out=shifted)
            torch.round(shifted, out=rounded).clamp_(0, 15)
            error = rounded.sub_(shifted).square_()
            if counts is not None:
                error = error.mul_(counts)
            error = error.sum(-1, keepdim=True).mul_((scale / span).square_())
            better = error < least
            least = torch.where(better, error, least)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    scale, zero = best_scale.squeeze(-1), best_zero.squeeze(-1)
    return scale, zero, ZERO_BASE + ZERO_STEP * zero
