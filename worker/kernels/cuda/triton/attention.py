"""Causal attention over the paged cache: decodes by splits of the keys, chunks by tiles of queries.

Invariant: a query's result is one sequence of operations, whichever kernel computes it and whatever its batch. Keys
come in tiles at fixed positions, tiles make splits of `SPLIT` positions with a softmax of their own (Dao et al.,
"Flash-Decoding", 2023), and splits are merged in order. What a query may not see leaves its state as it was, bit for
bit.

A dot's rows are the query heads that share a key head, times the positions of a tile of queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.cuda.triton.arithmetic import decode_e4m3, dot
from worker.kernels.cuda.triton.configs import architecture, launch, power_of_two, tiles
from worker.kernels.cuda.triton.rope import E4M3, INT8, PLAIN, cache_format, codes
from worker.kernels.interface import KVCache

SPLIT = 512
"""Positions of a split: one program's share of a long sequence's decode."""


@triton.jit
def _merge(peak, total, mixed, more_peak, more_total, more_mixed):
    """Two states over different keys as one (Milakov and Gimelshein, "Online normalizer calculation for softmax")."""
    top = tl.maximum(peak, more_peak)
    # Where neither saw anything, any finite peak will do.
    finite = tl.where(top == float("-inf"), 0.0, top)
    left, right = tl.exp2(peak - finite), tl.exp2(more_peak - finite)
    return top, total * left + more_total * right, mixed * left[:, None] + more_mixed * right[:, None]


@triton.jit
def _widen(code, dtype: tl.constexpr, FORMAT: tl.constexpr):
    if FORMAT == E4M3:
        return decode_e4m3(code).to(dtype)
    else:
        return code.to(tl.float32).to(dtype)


@triton.jit
def _attend_split(
    query,
    at,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    first,
    last,
    key_length,
    block_size,
    window,
    stride_block,
    stride_offset,
    scale_block,
    scale_offset,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Attention of queries [BLOCK_M, BLOCK_D] at positions `at` over the keys from `first` to `last`."""
    element = tl.arange(0, BLOCK_D)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        written = position < key_length
        block = tl.load(table + position // block_size, mask=written, other=0).to(tl.int64)
        offset = position % block_size
        place = block * stride_block + offset * stride_offset
        inside = written[:, None] & (element < D)[None, :]
        key = tl.load(keys + place[:, None] + element[None, :], mask=inside, other=0)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        score = dot(query, tl.trans(_widen(key, query.dtype, FORMAT)), zero) * scale
        scale_place = block * scale_block + offset * scale_offset
        if SCALED:
            score *= tl.load(key_scales + scale_place, mask=written, other=0.0)[None, :]
        distance = at[:, None] - position[None, :]
        score = tl.where((distance >= 0) & (distance < window), score, float("-inf"))
        top = tl.maximum(peak, tl.max(score, 1))
        finite = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(score - finite[:, None])
        shrink = tl.exp2(peak - finite)
        total = total * shrink + tl.sum(weight, 1)
        if SCALED:
            weight *= tl.load(value_scales + scale_place, mask=written, other=0.0)[None, :]
        value = tl.load(values + place[:, None] + element[None, :], mask=inside, other=0)
        mixed = dot(weight.to(query.dtype), _widen(value, query.dtype, FORMAT), mixed * shrink[:, None])
        peak = top
    return peak, total, mixed


@triton.jit(do_not_specialize=["table_width", "splits"])
def decode_kernel(
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    key_lengths,
    peaks,
    totals,
    mixes,
    table_width,
    splits,
    block_size,
    window,
    stride_head,
    stride_block,
    stride_offset,
    scale_head,
    scale_block,
    scale_offset,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALED: tl.constexpr,
):
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    key_length = tl.load(key_lengths + sequence)
    least = tl.maximum(key_length - window, 0)
    if (split * SPLIT < key_length) & ((split + 1) * SPLIT > least):
        member, element = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        real = member < GROUP
        row = (sequence * kv_heads + head) * GROUP + member
        inside = real[:, None] & (element < D)[None, :]
        query = tl.load(queries + row[:, None] * D + element[None, :], mask=inside, other=0.0)
        at = tl.full((BLOCK_M,), 0, tl.int32) + (key_length - 1)
        first = tl.maximum(split * SPLIT, least // BLOCK_N * BLOCK_N)
        peak, total, mixed = _attend_split(
            query,
            at,
            keys + head * stride_head,
            values + head * stride_head,
            key_scales + head * scale_head,
            value_scales + head * scale_head,
            tables + sequence * table_width,
            first,
            tl.minimum((split + 1) * SPLIT, key_length),
            key_length,
            block_size,
            window,
            stride_block,
            stride_offset,
            scale_block,
            scale_offset,
            scale,
            D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            FORMAT,
            SCALED,
        )
        part = row * splits + split
        tl.store(peaks + part, peak, mask=real)
        tl.store(totals + part, total, mask=real)
        tl.store(mixes + part[:, None] * D + element[None, :], mixed, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    peaks,
    totals,
    mixes,
    key_lengths,
    out,
    splits,
    window,
    heads,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    element = tl.arange(0, BLOCK_D)[None, :]
    inside = element < D
    # One row as a tile of one, so that what is merged is what chunks merge.
    row = sequence * heads + head + tl.arange(0, 1)
    key_length = tl.load(key_lengths + sequence)
    peak = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    mixed = tl.zeros((1, BLOCK_D), tl.float32)
    for split in range(tl.maximum(key_length - window, 0) // SPLIT, (key_length + SPLIT - 1) // SPLIT):
        part = row * splits + split
        more = tl.load(mixes + part[:, None] * D + element, mask=inside, other=0.0)
        peak, total, mixed = _merge(peak, total, mixed, tl.load(peaks + part), tl.load(totals + part), more)
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + row[:, None] * D + element, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["sequences", "rounds", "table_width"])
def ragged_kernel(
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    key_lengths,
    query_starts,
    out,
    sequences,
    rounds,
    table_width,
    block_size,
    window,
    stride_head,
    stride_block,
    stride_offset,
    scale_head,
    scale_block,
    scale_offset,
    scale,
    GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALED: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(1)
    per_tile: tl.constexpr = BLOCK_M // GROUP_P2
    # Sequence s owns the tiles from query_starts[s] // per_tile + s on: a few too many, and none has to be counted.
    sequence = sequences * 0
    beyond = sequences
    for _ in range(rounds):
        middle = (sequence + beyond) // 2
        mine = tl.load(query_starts + middle) // per_tile + middle <= tile
        sequence = tl.where((beyond - sequence > 1) & mine, middle, sequence)
        beyond = tl.where((beyond - sequence > 1) & (mine == 0), middle, beyond)
    start = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - start
    begin = (tile - (start // per_tile + sequence)) * per_tile
    if begin < count:
        key_length = tl.load(key_lengths + sequence)
        member, element = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        index, query_head = begin + member // GROUP_P2, member % GROUP_P2
        at = key_length - count + index
        row = ((start + index).to(tl.int64) * kv_heads + head) * GROUP + query_head
        inside = ((index < count) & (query_head < GROUP))[:, None] & (element < D)[None, :]
        query = tl.load(queries + row[:, None] * D + element[None, :], mask=inside, other=0.0)
        last = tl.minimum(key_length - count + begin + per_tile, key_length)
        least = tl.maximum(key_length - count + begin + 1 - window, 0)
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for split in range(least // SPLIT, (last + SPLIT - 1) // SPLIT):
            more_peak, more_total, more_mixed = _attend_split(
                query,
                at,
                keys + head * stride_head,
                values + head * stride_head,
                key_scales + head * scale_head,
                value_scales + head * scale_head,
                tables + sequence.to(tl.int64) * table_width,
                tl.maximum(split * SPLIT, least // BLOCK_N * BLOCK_N),
                tl.minimum((split + 1) * SPLIT, last),
                key_length,
                block_size,
                window,
                stride_block,
                stride_offset,
                scale_block,
                scale_offset,
                scale,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                FORMAT,
                SCALED,
            )
            peak, total, mixed = _merge(peak, total, mixed, more_peak, more_total, more_mixed)
        result = mixed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + row[:, None] * D + element[None, :], result.to(out.dtype.element_ty), mask=inside)


_NO_WINDOW = 2**31 - 1 - 2**24
"""Farther than any position, and what it is subtracted from does not wrap."""

_LOG2_E = 1.4426950408889634


def _scales(cache: KVCache) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The scales' tensors and strides; where there are none, a stand-in that is not read."""
    scales = cache.scales
    if scales is None:
        if cache_format(cache) == INT8.value:
            raise ValueError("an int8 cache needs scales")
        return codes(cache.keys), codes(cache.values), (0, 0, 0)
    return scales[0], scales[1], scales[0].stride()


def decode_attention(
    queries: Tensor,
    cache: KVCache,
    tables: Tensor,
    key_lengths: Tensor,
    max_keys: int,
    window: int | None,
    out: Tensor,
) -> Tensor:
    """Attention of one query a sequence, at its last position: [S, Q, D] to `out` [S, Q, D].

    `tables` int32 [S, blocks], `key_lengths` int32 [S]: positions written, the query's among them; 0 gives zeros.
    `max_keys` bounds them: it sets the grid, and is a graph's longest.
    """
    sequences, q_heads, head_dim = queries.shape
    kv_heads, _, block_size, _ = cache.keys.shape
    group, splits = q_heads // kv_heads, max(1, tiles(max_keys, SPLIT))
    coding, device = cache_format(cache), queries.device
    key_scales, value_scales, scale_strides = _scales(cache)
    peaks, totals = torch.empty(2, sequences, q_heads, splits, dtype=torch.float32, device=device).unbind()
    mixes = torch.empty(sequences, q_heads, splits, head_dim, dtype=torch.float32, device=device)
    width = _NO_WINDOW if window is None else window
    arch, shape = architecture(device), "wide" if queries.dtype == torch.float32 else "half"
    if not sequences:
        return out
    decode_kernel[(sequences, kv_heads, splits)](
        queries,
        codes(cache.keys),
        codes(cache.values),
        key_scales,
        value_scales,
        tables,
        key_lengths,
        peaks,
        totals,
        mixes,
        tables.stride(0),
        splits,
        block_size,
        width,
        *cache.keys.stride()[:3],
        *scale_strides,
        head_dim**-0.5 * _LOG2_E,
        GROUP=group,
        D=head_dim,
        SPLIT=SPLIT,
        BLOCK_M=max(16, power_of_two(group)),
        BLOCK_D=power_of_two(head_dim),
        FORMAT=coding,
        SCALED=cache.scales is not None,
        **launch("decode", shape, arch),
    )
    merge_kernel[(sequences, q_heads)](
        peaks,
        totals,
        mixes,
        key_lengths,
        out,
        splits,
        width,
        q_heads,
        D=head_dim,
        SPLIT=SPLIT,
        BLOCK_D=power_of_two(head_dim),
        **launch("merge", "any", arch),
    )
    return out


def ragged_attention(
    queries: Tensor,
    cache: KVCache,
    tables: Tensor,
    key_lengths: Tensor,
    query_starts: Tensor,
    window: int | None,
    out: Tensor,
) -> Tensor:
    """Attention of chunks of any lengths, the last queries of their sequences: [rows, Q, D] to `out` [rows, Q, D].

    `tables` and `key_lengths` as for `decode_attention`; `query_starts` int32 [S + 1] holds each chunk's first row.
    Rows past the last chunk are not written.
    """
    rows, q_heads, head_dim = queries.shape
    kv_heads, _, block_size, _ = cache.keys.shape
    group = q_heads // kv_heads
    sequences = tables.shape[0]
    coding, device = cache_format(cache), queries.device
    key_scales, value_scales, scale_strides = _scales(cache)
    shape = "wide" if queries.dtype == torch.float32 else "half" if coding == PLAIN.value else "coded"
    config = launch("ragged", shape, architecture(device))
    group_p2 = power_of_two(group)
    block_m = max(config["BLOCK_M"], group_p2)
    if not sequences or not rows:
        return out
    ragged_kernel[(rows // (block_m // group_p2) + sequences, kv_heads)](
        queries,
        codes(cache.keys),
        codes(cache.values),
        key_scales,
        value_scales,
        tables,
        key_lengths,
        query_starts,
        out,
        sequences,
        sequences.bit_length(),
        tables.stride(0),
        block_size,
        _NO_WINDOW if window is None else window,
        *cache.keys.stride()[:3],
        *scale_strides,
        head_dim**-0.5 * _LOG2_E,
        GROUP=group,
        GROUP_P2=group_p2,
        D=head_dim,
        SPLIT=SPLIT,
        BLOCK_D=power_of_two(head_dim),
        FORMAT=coding,
        SCALED=cache.scales is not None,
        **{**config, "BLOCK_M": block_m},
    )
    return out
