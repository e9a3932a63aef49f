"""Head norms, rotation and the cache write: one program for each row and head.

A cache of 8 bits holds e4m3 or int8 codes. With scales, float32 for each position and head, a vector's largest element
takes the greatest code; without, e4m3 codes are the values themselves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.cuda.triton.arithmetic import encode_e4m3, round_to_int8
from worker.kernels.cuda.triton.configs import architecture, launch, power_of_two
from worker.kernels.interface import KVCache

PLAIN, INT8, E4M3 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def cache_format(cache: KVCache) -> int:
    """How a cache's elements are coded: PLAIN, INT8 or E4M3. Raises ValueError for other codes."""
    if cache.keys.dtype == torch.int16:
        raise ValueError("a cache of int16 is for CPUs")
    return {torch.int8: 1, torch.float8_e4m3fn: 2}.get(cache.keys.dtype, 0)


def codes(pool: Tensor) -> Tensor:
    """The pool as kernels take it: e4m3 as bytes, which every architecture has."""
    return pool.view(torch.uint8) if pool.dtype == torch.float8_e4m3fn else pool


@triton.jit
def _write(
    pool,
    scales,
    at,
    scale_at,
    first,
    second,
    half,
    inside,
    HALF: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALED: tl.constexpr,
):
    if FORMAT == PLAIN:
        tl.store(pool + at + half, first.to(pool.dtype.element_ty), mask=inside)
        tl.store(pool + at + HALF + half, second.to(pool.dtype.element_ty), mask=inside)
    else:
        first, second = first.to(tl.float32), second.to(tl.float32)
        if SCALED:
            most = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
            scale = tl.maximum(most, 1e-30) / (127.0 if FORMAT == INT8 else 448.0)
            tl.store(scales + scale_at, scale)
            first, second = first / scale, second / scale
        if FORMAT == INT8:
            tl.store(pool + at + half, round_to_int8(first), mask=inside)
            tl.store(pool + at + HALF + half, round_to_int8(second), mask=inside)
        else:
            tl.store(pool + at + half, encode_e4m3(first), mask=inside)
            tl.store(pool + at + HALF + half, encode_e4m3(second), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def rope_and_cache_kernel(
    qkv,
    cos,
    sin,
    slots,
    q_norm,
    k_norm,
    keys,
    values,
    key_scales,
    value_scales,
    out,
    tokens,
    eps,
    block_size,
    stride_head,
    stride_block,
    stride_offset,
    scale_head,
    scale_block,
    scale_offset,
    Q: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALED: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, BLOCK)
    inside = half < HALF
    source = qkv + (row * (Q + 2 * K) + head) * (2 * HALF) + half
    first, second = tl.load(source, mask=inside, other=0.0), tl.load(source + HALF, mask=inside, other=0.0)
    if head < Q + K:
        wide1, wide2 = first.to(tl.float32), second.to(tl.float32)
        if NORM:
            square = tl.sum(wide1 * wide1 + wide2 * wide2, 0) / (2 * HALF)
            scale = tl.rsqrt(square + eps)
            if head < Q:
                gain1 = tl.load(q_norm + half, mask=inside, other=0.0)
                gain2 = tl.load(q_norm + HALF + half, mask=inside, other=0.0)
            else:
                gain1 = tl.load(k_norm + half, mask=inside, other=0.0)
                gain2 = tl.load(k_norm + HALF + half, mask=inside, other=0.0)
            wide1 = wide1 * scale * gain1.to(tl.float32)
            wide2 = wide2 * scale * gain2.to(tl.float32)
        c = tl.load(cos + row * HALF + half, mask=inside, other=0.0)
        s = tl.load(sin + row * HALF + half, mask=inside, other=0.0)
        first = (wide1 * c - wide2 * s).to(first.dtype)
        second = (wide2 * c + wide1 * s).to(second.dtype)
    if head < Q:
        to = out + (row * Q + head) * (2 * HALF) + half
        tl.store(to, first, mask=inside)
        tl.store(to + HALF, second, mask=inside)
    elif row < tokens:
        slot = tl.load(slots + row)
        if slot >= 0:
            block, offset = slot // block_size, slot % block_size
            kv_head = ((head - Q) % K).to(tl.int64)
            at = kv_head * stride_head + block * stride_block + offset * stride_offset
            scale_at = kv_head * scale_head + block * scale_block + offset * scale_offset
            if head < Q + K:
                _write(keys, key_scales, at, scale_at, first, second, half, inside, HALF, FORMAT, SCALED)
            else:
                _write(values, value_scales, at, scale_at, first, second, half, inside, HALF, FORMAT, SCALED)


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    slots: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    out: Tensor,
) -> Tensor:
    """See `Kernels.rope_and_cache`: queries into `out`, [T, Q, D].

    The cache's tensors are [K, blocks, block size, D] in any order of strides, of which D's is 1 and both are the same.
    A negative slot is not written. Raises ValueError for an int8 cache without scales.
    """
    kv_heads, _, block_size, head_dim = cache.keys.shape
    rows, width = qkv.shape
    q_heads = width // head_dim - 2 * kv_heads
    coding, scales = cache_format(cache), cache.scales
    if coding == INT8.value and scales is None:
        raise ValueError("an int8 cache needs scales")
    norms = q_norm is not None and k_norm is not None
    key_scales, value_scales = (cos, cos) if scales is None else scales
    strides = key_scales.stride() if scales is not None else (0, 0, 0)
    if rows:
        rope_and_cache_kernel[(rows, q_heads + 2 * kv_heads)](
            qkv,
            cos,
            sin,
            slots,
            q_norm if norms else qkv,
            k_norm if norms else qkv,
            codes(cache.keys),
            codes(cache.values),
            key_scales,
            value_scales,
            out,
            slots.shape[0],
            eps,
            block_size,
            *cache.keys.stride()[:3],
            *strides,
            Q=q_heads,
            K=kv_heads,
            HALF=head_dim // 2,
            BLOCK=power_of_two(head_dim // 2),
            NORM=norms,
            FORMAT=coding,
            SCALED=scales is not None,
            **launch("rope_and_cache", "any", architecture(qkv.device)),
        )
    return out
