"""RMSNorm with its residual, and the gated activation: one program a row or a tile of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.cuda.triton.configs import architecture, launch, power_of_two, tiles


@triton.jit
def rms_norm_kernel(x, weight, residual, out, total, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row + column, mask=inside, other=0.0)
    if ADDS:
        value = (value.to(tl.float32) + tl.load(residual + row + column, mask=inside, other=0.0)).to(value.dtype)
        tl.store(total + row + column, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0)
    normed = (wide * scale).to(value.dtype)
    tl.store(out + row + column, (normed.to(tl.float32) * gain.to(tl.float32)).to(value.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `Kernels.rms_norm`: [T, H] twice. The sum takes `residual`'s memory where there is one."""
    rows, width = x.shape
    out = torch.empty_like(x)
    total = x if residual is None else residual
    if rows:
        rms_norm_kernel[(rows,)](
            x,
            weight,
            total,
            out,
            total,
            width,
            eps,
            ADDS=residual is not None,
            BLOCK=power_of_two(width),
            **launch("rms_norm", "wide" if width > 4096 else "narrow", architecture(x.device)),
        )
    return out, total


@triton.jit
def silu_mul_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = gate_up + row * 2 * width + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0)
    gated = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out + row * width + column, (gated.to(tl.float32) * up.to(tl.float32)).to(up.dtype), mask=inside)


def silu_mul(gate_up: Tensor, out: Tensor) -> Tensor:
    """See `Kernels.silu_mul`: [T, 2 N] to `out` [T, N]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    config = launch("silu_mul", "any", architecture(gate_up.device))
    if rows:
        silu_mul_kernel[(rows, tiles(width, config["BLOCK"]))](gate_up, out, width, **config)
    return out
