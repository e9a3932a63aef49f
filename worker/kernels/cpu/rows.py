"""Norms, rotation with the cache write, and the gated activation: checks and addresses for `native/rows.h`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from worker.kernels.cpu.attention import MAX_HEAD_DIM, cache_addresses
from worker.kernels.interface import KVCache


def _check(name: str, tensor: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> int:
    """The address of a contiguous tensor of this shape and type. Raises ValueError."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.data_ptr()


def rms_norm(
    native: ModuleType,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `Kernels.rms_norm`. All float32 and contiguous; `out` may be `x`, `total` may be `residual` or `x`."""
    rows, size = x.shape
    address = _check("x", x, rows, size)
    if out is None:
        out = torch.empty_like(x)
    if residual is None:
        total = x
    elif total is None:
        total = torch.empty_like(x)
    native.rms_norm(
        address,
        0 if residual is None else _check("residual", residual, rows, size),
        _check("weight", weight, size),
        eps,
        _check("out", out, rows, size),
        _check("total", total, rows, size),
        rows,
        size,
    )
    return out, total


def rope_and_cache(
    native: ModuleType,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    slots: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """See `Kernels.rope_and_cache`. Activations and norm weights are float32; `out` is the queries, [T, Q, D].

    Slots must lie in the cache, which isn't checked here.
    """
    kv_heads, blocks, block_size, head_dim = cache.keys.shape
    rows, tokens = qkv.shape[0], slots.shape[0]
    q_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if head_dim % 16 or head_dim > MAX_HEAD_DIM or q_heads < 1:
        raise ValueError(f"can't split {qkv.shape[1]} columns into heads of {head_dim}, {kv_heads} of them keys")
    if tokens > rows or (q_norm is None) != (k_norm is None):
        raise ValueError("expected a slot for each token at most, and both norms or none")
    if out is None:
        out = torch.empty(rows, q_heads, head_dim)
    native.rope_and_cache(
        _check("qkv", qkv, rows, (q_heads + 2 * kv_heads) * head_dim),
        _check("cos", cos, rows, head_dim // 2),
        _check("sin", sin, rows, head_dim // 2),
        0 if q_norm is None else _check("q_norm", q_norm, head_dim),
        0 if k_norm is None else _check("k_norm", k_norm, head_dim),
        eps,
        _check("slots", slots, tokens, dtype=torch.int64),
        rows,
        tokens,
        q_heads,
        kv_heads,
        head_dim,
        blocks * block_size,
        *cache_addresses(cache),
        _check("out", out, rows, q_heads, head_dim),
    )
    return out
