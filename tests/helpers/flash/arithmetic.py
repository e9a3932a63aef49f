"""Attention as flash-attn defines it, one query at a time in float32, and what it checks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check(condition: bool, message: str) -> None:
    """As TORCH_CHECK does."""
    if not condition:
        raise RuntimeError(message)


def check_paged(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, multiple: int) -> Tensor:
    """What holds for every paged call; gives the block table."""
    check(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    check(k.dtype == q.dtype and v.dtype == q.dtype, "query, key and value must have the same dtype")
    check(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    check(q.shape[-1] <= 256 and q.shape[-1] % 8 == 0, "head dimension")
    check(q.shape[-2] % k.shape[2] == 0, "Number of heads in key/value must divide number of heads in query")
    check(k.dim() == 4 and k.shape == v.shape and k.shape[3] == q.shape[-1], "shapes of a paged cache")
    if table is None:
        raise RuntimeError("a stand-in for paged caches alone")
    check(table.dtype == torch.int32 and table.stride(-1) == 1, "block_table must be int32 and contiguous")
    check(k.shape[1] % multiple == 0, f"Paged KV cache block size must be divisible by {multiple}")
    return table


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    key_lengths: Sequence[int],
    query_lengths: Sequence[int],
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
) -> Tensor:
    """q [rows, Q, D] over a cache [blocks, block size, K, D]; masks are aligned to the bottom right corner."""
    check(len(key_lengths) == len(query_lengths) == len(table), "one table for each sequence")
    check(sum(query_lengths) == len(q), "queries of all sequences")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[2]
    left, right = window
    right = 0 if causal else right
    out = torch.zeros_like(q)
    row = 0
    for sequence, (keys, queries) in enumerate(zip(key_lengths, query_lengths, strict=True)):
        size = k.shape[1]
        blocks = table[sequence, : -(-keys // size)].long()
        own_k = k[blocks].flatten(0, 1)[:keys].float().repeat_interleave(group, 1)
        own_v = v[blocks].flatten(0, 1)[:keys].float().repeat_interleave(group, 1)
        for query in range(queries):
            at = keys - queries + query
            first = 0 if left < 0 else max(0, at - left)
            last = keys if right < 0 else min(keys, at + right + 1)
            if last > first:
                scores = torch.einsum("qd,kqd->qk", q[row].float(), own_k[first:last]) * scale
                out[row] = torch.einsum("qk,kqd->qd", scores.softmax(-1), own_v[first:last]).to(q.dtype)
            row += 1
    return out


def lengths_of(starts: Tensor) -> list[int]:
    """From running sums."""
    check(starts.dtype == torch.int32, "cu_seqlens must have dtype int32")
    return [int(n) for n in starts.diff()]
