"""Products with weights of 4, 8, 16 or 32 bits, and with those of many experts.

A weight of few bits is dequantized in registers, to the activations' dtype, and multiplied like any other. Few rows
leave most of a GPU idle, so the sum over the inputs may be split: parts are added in order by a second kernel. How a
sum is cut follows the launch alone, and `fixed` takes one launch for any number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.cuda.triton.arithmetic import dot
from worker.kernels.cuda.triton.configs import Launch, architecture, launch, tiles
from worker.kernels.quantized import GROUP, ZERO_BASE, ZERO_STEP, QuantizedWeight

DENSE, INT8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True, slots=True)
class Codes:
    """weight[n, k] = scale[n, g] * (q[n, k] - (zero_base + zero_step * zero[n, g])), g = k // group."""

    q: Tensor
    """8 bits: int8 [N, K]. 4 bits: uint8 [N, ceil(K / 2)], value 2i in the low half of byte i."""
    scale: Tensor
    """[N, G]; float16, bfloat16 or float32."""
    zero: Tensor | None
    """uint8 [N, G], for 4 bits."""
    group: int
    zero_base: float = 0.0
    zero_step: float = 1.0

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Codes:
        """The same memory."""
        return cls(weight.q, weight.scale, weight.zero, GROUP[weight.format], ZERO_BASE, ZERO_STEP)


@triton.jit
def _weights(
    q,
    scale,
    zero,
    n,
    k0,
    N,
    inner,
    groups,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows `n` of the weight from input `k0` on, [BLOCK_N, BLOCK_K]."""
    real = (n < N)[:, None]
    row = n.to(tl.int64)[:, None]
    k = k0 + tl.arange(0, BLOCK_K)
    if FORMAT == DENSE:
        return tl.load(q + row * inner + k[None, :], mask=real & (k < inner)[None, :], other=0.0)
    else:
        many: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
        each: tl.constexpr = BLOCK_K // many
        group = k0 // GROUP + tl.arange(0, many)
        there = real & (group < groups)[None, :]
        place = row * groups + group[None, :]
        scales = tl.load(scale + place, mask=there, other=0.0).to(tl.float32)
        scales = tl.reshape(tl.broadcast_to(scales[:, :, None], (BLOCK_N, many, each)), (BLOCK_N, BLOCK_K))
        if FORMAT == INT8:
            wide = tl.load(q + row * inner + k[None, :], mask=real & (k < inner)[None, :], other=0).to(tl.float32)
        else:
            width = (inner + 1) // 2
            byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)
            pair = tl.load(q + row * width + byte[None, :], mask=real & (byte < width)[None, :], other=0)
            codes = tl.interleave(pair & 15, pair >> 4).to(tl.float32)
            zeros = ZERO_BASE + ZERO_STEP * tl.load(zero + place, mask=there, other=0).to(tl.float32)
            zeros = tl.reshape(tl.broadcast_to(zeros[:, :, None], (BLOCK_N, many, each)), (BLOCK_N, BLOCK_K))
            wide = codes - zeros
        return (wide * scales).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,
    q,
    scale,
    zero,
    bias,
    out,
    rows,
    N,
    inner,
    groups,
    BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO_BASE: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    share = (inner + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(split * share, tl.minimum((split + 1) * share, inner), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        left = tl.load(
            x + m.to(tl.int64)[:, None] * inner + k[None, :],
            mask=(m < rows)[:, None] & (k < inner)[None, :],
            other=0.0,
        )
        weight = _weights(
            q,
            scale,
            zero,
            n,
            k0,
            N,
            inner,
            groups,
            left.dtype,
            FORMAT,
            GROUP,
            ZERO_BASE,
            ZERO_STEP,
            BLOCK_N,
            BLOCK_K,
        )
        total = dot(left, tl.trans(weight), total)
    if BIAS and SPLITS == 1:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    to = out + (split * rows + m).to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["rows"])
def add_parts_kernel(parts, bias, out, rows, N, BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * rows + row) * N + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask=n < N)


def _launch(kind: str, rows: int, arch: int, *, fixed: bool) -> Launch:
    size = "fixed" if fixed else "few" if rows <= 16 else "some" if rows <= 64 else "many"
    return launch(kind, size, arch)


def linear(
    x: Tensor, weight: Tensor | Codes, bias: Tensor | None, out: Tensor | None = None, *, fixed: bool = False
) -> Tensor:
    """x @ weight.T + bias: [T, K] to [T, N], for a weight [N, K]; all contiguous.

    `fixed`: whether a row's bits must not depend on T.
    """
    rows, inner = x.shape
    codes = weight if isinstance(weight, Codes) else Codes(weight, weight, weight, inner)
    outer = codes.q.shape[0]
    form = DENSE.value if codes.q is weight else INT8.value if codes.q.dtype == torch.int8 else INT4.value
    kind = "linear_wide" if x.dtype == torch.float32 else ("linear", "linear_int8", "linear_int4")[form]
    arch = architecture(x.device)
    config = _launch(kind, rows, arch, fixed=fixed)
    splits = config["SPLITS"]
    if out is None:
        out = x.new_empty(rows, outer)
    if not rows:
        return out
    parts = out if splits == 1 else torch.empty(splits, rows, outer, dtype=torch.float32, device=x.device)
    linear_kernel[(tiles(rows, config["BLOCK_M"]), tiles(outer, config["BLOCK_N"]), splits)](
        x,
        codes.q,
        codes.scale,
        codes.scale if codes.zero is None else codes.zero,
        x if bias is None else bias,
        parts,
        rows,
        outer,
        inner,
        codes.scale.shape[1],
        BIAS=bias is not None,
        FORMAT=form,
        GROUP=codes.group,
        ZERO_BASE=codes.zero_base,
        ZERO_STEP=codes.zero_step,
        **config,
    )
    if splits > 1:
        adding = launch("add_parts", "any", arch)
        add_parts_kernel[(rows, tiles(outer, adding["BLOCK"]))](
            parts, x if bias is None else bias, out, rows, outer, BIAS=bias is not None, SPLITS=splits, **adding
        )
    return out
