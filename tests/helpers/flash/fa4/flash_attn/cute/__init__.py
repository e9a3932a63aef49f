"""flash-attn-4 4.0.0b36, as far as it is called here. Its distribution brings no `flash_attn` of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.flash.arithmetic import attend, check, check_paged, lengths_of

__version__ = "4.0.0b36"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Any = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Any = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Any = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Any = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    mask_mod: Any = None,
    block_sparse_tensors: Any = None,
    aux_tensors: Any = None,
    aux_scalars: Any = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> tuple[Tensor, None]:
    table = check_paged(q, k, v, page_table, 1)
    check(cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k")
    if cu_seqlens_q is None or seqused_k is None:
        raise RuntimeError("ragged queries and used lengths are needed here")
    check(seqused_k.dtype == torch.int32, "seqused_k must be int32")
    queries, keys = lengths_of(cu_seqlens_q), seqused_k.tolist()
    check(max(queries) <= (max_seqlen_q or 0) and max(keys) <= (max_seqlen_k or 0), "lengths beyond what was announced")
    left, right = window_size
    window = (-1 if left is None else left, -1 if right is None else right)
    return attend(q, k, v, table, keys, queries, softmax_scale, causal, window), None
