"""Signatures of flash-attn's functions as their sources have them, without annotations, and where they were read.

`python -m scripts.flash_signatures ARCHIVE...` compares them with source archives and wheels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Signature:
    """One function of a release."""

    module: str
    """As it is imported."""
    function: str
    arguments: str
    archive: str
    """The file on the package index, or the repository's commit."""
    path: str
    """Within the archive."""
    sha256: str
    """Of the archive; empty for a commit."""


_FLASH_ATTN = (
    "flash_attn-2.8.3.tar.gz",
    "flash_attn-2.8.3/flash_attn/flash_attn_interface.py",
    "1e71dd64a9e0280e0447b8a0c2541bad4bf6ac65bdeaa2f90e51a9e57de0370d",
)
_HOPPER = (_FLASH_ATTN[0], "flash_attn-2.8.3/hopper/flash_attn_interface.py", _FLASH_ATTN[2])
_FLASH_ATTN_4 = (
    "flash_attn_4-4.0.0b36-py3-none-any.whl",
    "flash_attn/cute/interface.py",
    "b6f0e2a264334cb1b59289ddd309c7c76d3a8d184268316b43403e51ba8795d2",
)
_WITH_KVCACHE_3 = (
    "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
    "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
    "max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
    "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False"
)

SIGNATURES = (
    Signature(
        "flash_attn",
        "flash_attn_varlen_func",
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
        "return_attn_probs=False, block_table=None",
        *_FLASH_ATTN,
    ),
    Signature(
        "flash_attn",
        "flash_attn_with_kvcache",
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False",
        *_FLASH_ATTN,
    ),
    # flash-attn 3 is no release of its own on the index: what lies in flash-attn's archive, and a later commit of
    # github.com/Dao-AILab/flash-attention, which has the same.
    Signature("flash_attn_interface", "flash_attn_with_kvcache", _WITH_KVCACHE_3, *_HOPPER),
    Signature(
        "flash_attn_interface",
        "flash_attn_with_kvcache",
        _WITH_KVCACHE_3,
        "commit c082294e0f6c01d46318694a6f3e0274225a9683",
        "hopper/flash_attn_interface.py",
        "",
    ),
    Signature(
        "flash_attn.cute",
        "flash_attn_varlen_func",
        "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
        "min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, "
        "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, "
        "block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, "
        "seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False, "
        "gather_bwd_token_chunk=None",
        *_FLASH_ATTN_4,
    ),
)
