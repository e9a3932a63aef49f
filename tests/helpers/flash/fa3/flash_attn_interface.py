"""flash-attn 3, as far as it is called here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.flash.arithmetic import attend, check, check_paged, lengths_of

__version__ = "3.0.0"


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Any = None,
    v: Any = None,
    qv: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: Any = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    table = check_paged(q, k_cache, v_cache, page_table, 1)
    if not isinstance(cache_seqlens, Tensor):
        raise RuntimeError("lengths are a tensor here")
    check(cache_seqlens.dtype == torch.int32, "seqused_k must have dtype int32")
    if cu_seqlens_q is None:
        check(q.dim() == 4, "q must be [batch, seqlen, heads, head dim]")
        queries = [q.shape[1]] * q.shape[0]
    else:
        check(q.dim() == 3 and max_seqlen_q is not None, "ragged queries come with their longest length")
        queries = lengths_of(cu_seqlens_q)
        check(max(queries) <= (max_seqlen_q or 0), "lengths beyond what was announced")
    rows = q.flatten(0, 1) if q.dim() == 4 else q
    keys = cache_seqlens.tolist()
    return attend(rows, k_cache, v_cache, table, keys, queries, softmax_scale, causal, window_size).view(q.shape)
