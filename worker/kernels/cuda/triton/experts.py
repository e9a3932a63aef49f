"""Products of a mixture of experts: rows sorted by expert, each tile of rows with its expert's weight.

Nothing is counted on the host: a grid has as many tiles as any distribution of rows could need, and a tile finds its
expert by bisection. What a row gets depends on that row and its expert alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.cuda.triton.arithmetic import dot
from worker.kernels.cuda.triton.configs import architecture, launch, tiles


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """Which expert takes which rows; R = T * top_k slots, of which slot i is token i // top_k's."""

    order: Tensor
    """int32 [R]: slots by expert, and by slot within one."""
    starts: Tensor
    """int32 [experts + 1]: where each expert's slots begin."""


def plan_experts(chosen: Tensor, experts: int) -> ExpertPlan:
    """The plan for experts `chosen` int64 [T, top_k]."""
    flat = chosen.flatten()
    ranked, order = torch.sort(flat, stable=True)
    starts = torch.searchsorted(ranked, torch.arange(experts + 1, device=flat.device))
    return ExpertPlan(order.int(), starts.int())


@triton.jit(do_not_specialize=["slots"])
def experts_kernel(
    x,
    weights,
    order,
    starts,
    shares,
    out,
    slots,
    experts,
    rounds,
    N,
    inner,
    DIVISOR: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Expert e owns the tiles from starts[e] // BLOCK_M + e on.
    expert = experts * 0
    beyond = experts
    for _ in range(rounds):
        middle = (expert + beyond) // 2
        mine = tl.load(starts + middle) // BLOCK_M + middle <= tile
        expert = tl.where((beyond - expert > 1) & mine, middle, expert)
        beyond = tl.where((beyond - expert > 1) & (mine == 0), middle, beyond)
    start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    first = start + (tile - (start // BLOCK_M + expert)) * BLOCK_M
    if first < end:
        index = first + tl.arange(0, BLOCK_M)
        real = index < end
        slot = tl.load(order + index, mask=real, other=0).to(tl.int64)
        source = x + (slot // DIVISOR)[:, None] * inner
        row = weights + (expert.to(tl.int64) * N + n)[:, None] * inner
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, inner, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            within = (k < inner)[None, :]
            left = tl.load(source + k[None, :], mask=real[:, None] & within, other=0.0)
            right = tl.load(row + k[None, :], mask=(n < N)[:, None] & within, other=0.0)
            total = dot(left, tl.trans(right), total)
        if SHARED:
            total *= tl.load(shares + slot, mask=real, other=0.0)[:, None]
        to = out + slot[:, None] * N + n[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=real[:, None] & (n < N)[None, :])


def expert_linear(x: Tensor, weights: Tensor, plan: ExpertPlan, shares: Tensor | None, out: Tensor) -> Tensor:
    """Each slot's row times its expert's weight [experts, N, K]: `out` [R, N].

    `x` is [T, K], which the slots of a token share, or [R, K]. `shares` float32 [R] multiplies each slot's result.
    """
    slots, outer = out.shape
    rows, inner = x.shape
    if not slots:
        return out
    experts = weights.shape[0]
    per_expert = slots / experts
    size = "few" if per_expert <= 16 else "many"
    config = launch("experts_wide" if x.dtype == torch.float32 else "experts", size, architecture(x.device))
    experts_kernel[(slots // config["BLOCK_M"] + experts, tiles(outer, config["BLOCK_N"]))](
        x,
        weights,
        plan.order,
        plan.starts,
        out if shares is None else shares,
        out,
        slots,
        experts,
        experts.bit_length(),
        outer,
        inner,
        DIVISOR=slots // rows,
        SHARED=shares is not None,
        **config,
    )
    return out


@triton.jit
def combine_kernel(slots, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for index in tl.static_range(TOP_K):
        total += tl.load(slots + (row * TOP_K + index) * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)


def combine_experts(slots: Tensor, out: Tensor) -> Tensor:
    """Sums of each token's slots, in their order: [T * top_k, H] to `out` [T, H]."""
    rows, width = out.shape
    config = launch("combine", "any", architecture(out.device))
    if rows:
        combine_kernel[(rows, tiles(width, config["BLOCK"]))](slots, out, width, TOP_K=slots.shape[0] // rows, **config)
    return out
