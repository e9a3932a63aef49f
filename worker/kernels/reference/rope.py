"""Rotary position embedding with the head norms before it and the cache write after it."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.kernels.interface import GREATEST_CODES, KVCache


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates float32 [T, N, D] by float32 [T, D / 2], pairing element i with i + D / 2 (Su et al., RoFormer)."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def encode(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors as a cache of int8 or int16 holds them: codes, and the scales [...] that make numbers of them. A
    vector with a not-a-number or an infinity has a scale of not-a-number."""
    rows, greatest = rows.to(torch.float32), GREATEST_CODES[dtype]
    scales = rows.abs().amax(-1, keepdim=True) / greatest
    codes = torch.where(scales > 0, rows / scales, 0.0).round_().clamp_(-greatest, greatest)
    return codes.nan_to_num_(0.0).to(dtype), torch.where(scales.isinf(), torch.nan, scales).squeeze(-1)


def rope_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    slots: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """See `Kernels.rope_and_cache`. Float32 from the projection to the one rounding at the end."""
    kv_heads, num_blocks, block_size, head_dim = cache.keys.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q_heads = heads.shape[1] - 2 * kv_heads
    turned = heads[:, : q_heads + kv_heads].to(torch.float32)
    if q_norm is not None and k_norm is not None:
        scale = torch.rsqrt((turned * turned).mean(-1, keepdim=True) + eps)
        weights = torch.cat((q_norm.expand(q_heads, -1), k_norm.expand(kv_heads, -1))).to(torch.float32)
        turned = turned * scale * weights
    turned = rotate(turned, cos, sin).to(qkv.dtype)
    tokens = slots.shape[0]
    written = turned[:tokens, q_heads:], heads[:tokens, q_heads + kv_heads :]
    for index, (pool, rows) in enumerate(zip((cache.keys, cache.values), written, strict=True)):
        if cache.scales is not None:
            rows, scales = encode(rows, pool.dtype)
            cache.scales[index].view(kv_heads, num_blocks * block_size).index_copy_(1, slots, scales.t())
        pool.view(kv_heads, num_blocks * block_size, head_dim).index_copy_(
            1, slots, rows.transpose(0, 1).to(pool.dtype)
        )
    return turned[:, :q_heads]
