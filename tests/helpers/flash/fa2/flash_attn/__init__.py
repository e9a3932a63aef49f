"""flash-attn 2.8.3, as far as it is called here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.flash.arithmetic import attend, check, check_paged, lengths_of

__version__ = "2.8.3"
__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache"]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    table = check_paged(q, k, v, block_table, 256)
    queries, keys = lengths_of(cu_seqlens_q), lengths_of(cu_seqlens_k)
    check(max(queries) <= max_seqlen_q and max(keys) <= max_seqlen_k, "lengths beyond what was announced")
    return attend(q, k, v, table, keys, queries, softmax_scale, causal, window_size)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    table = check_paged(q, k_cache, v_cache, block_table, 256)
    check(q.dim() == 4, "q must be [batch, seqlen, heads, head dim]")
    if not isinstance(cache_seqlens, Tensor):
        raise RuntimeError("lengths are a tensor here")
    check(cache_seqlens.dtype == torch.int32, "seqlens_k must have dtype int32")
    queries = [q.shape[1]] * q.shape[0]
    flat = attend(
        q.flatten(0, 1), k_cache, v_cache, table, cache_seqlens.tolist(), queries, softmax_scale, causal, window_size
    )
    return flat.view(q.shape)
