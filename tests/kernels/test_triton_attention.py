"""Paged attention in Triton against the reference, under the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.interpreter import TOLERANCE
from worker.kernels import KVCache, RaggedBatch, ReferenceKernels
from worker.kernels.cuda import triton as kernels
from worker.kernels.cuda.triton import attention

REFERENCE = ReferenceKernels()
SEQUENCES = st.lists(st.tuples(st.integers(0, 70), st.one_of(st.just(1), st.integers(2, 20))), min_size=1, max_size=3)


def paged(
    sequences: list[tuple[int, int]], kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[KVCache, RaggedBatch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random cache, the sequences in it, and their tables, lengths and first rows as kernels take them."""
    generator = torch.Generator().manual_seed(len(sequences) + head_dim)
    needs = [-(-(start + count) // block_size) for start, count in sequences]
    blocks = sum(needs) + 2
    shape = (kv_heads, blocks, block_size, head_dim)
    cache = KVCache(*(torch.randn(shape, generator=generator).to(dtype) for _ in range(2)))
    order = torch.randperm(blocks, generator=generator)
    tables = torch.zeros(len(sequences), max(needs), dtype=torch.int32)
    for row, own in enumerate(torch.split(order[: sum(needs)], needs)):
        tables[row, : len(own)] = own
    starts, lengths = np.array(sequences, np.int64).T
    owned = [table[:need].numpy().astype(np.int64) for table, need in zip(tables, needs, strict=True)]
    batch = RaggedBatch(starts, lengths, owned, blocks, block_size)
    ends = torch.from_numpy(starts + lengths).int()
    firsts = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))).int()
    return cache, batch, tables, ends, firsts


def reference(queries: torch.Tensor, cache: KVCache, batch: RaggedBatch, window: int | None) -> torch.Tensor:
    """[rows, Q, D] by the reference."""
    plan = REFERENCE.plan_attention(batch, cache.keys.shape[0], [window])
    return REFERENCE.paged_attention(queries, cache, plan, window).view(queries.shape)


@settings(max_examples=10, deadline=None)
@given(
    SEQUENCES,
    st.sampled_from([1, 2, 5, 7, 8]),
    st.integers(1, 2),
    st.sampled_from([64, 80, 96, 128]),
    st.sampled_from([16, 64, 256]),
    st.sampled_from([None, 1, 30, 70]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_against_the_reference(
    sequences: list[tuple[int, int]],
    group: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    cache, batch, tables, ends, firsts = paged(sequences, kv_heads, block_size, head_dim, dtype)
    rows = int(firsts[-1])
    queries = torch.randn(rows, kv_heads * group, head_dim, generator=torch.Generator().manual_seed(rows)).to(dtype)
    wanted = reference(queries, cache, batch, window)
    out = torch.full_like(queries, torch.nan)
    kernels.ragged_attention(queries, cache, tables, ends, firsts, window, out)
    assert (out - wanted).abs().max() <= TOLERANCE[str(dtype)]
    last = (firsts[1:] - 1).long()
    ones = torch.full_like(queries[last], torch.nan)
    kernels.decode_attention(queries[last], cache, tables, ends, int(ends.max()), window, ones)
    assert (ones - wanted[last]).abs().max() <= TOLERANCE[str(dtype)]


@pytest.mark.parametrize("window", [None, 600])
def test_splits_are_merged_and_graphs_may_leave_room(window: int | None) -> None:
    """Sequences of several splits, one of none (a graph's dummy row), and a grid for longer ones than there are."""
    length = 2 * attention.SPLIT + 40
    cache, batch, tables, ends, firsts = paged([(length, 1), (3, 1)], 1, 16, 64, torch.float32)
    queries = torch.randn(3, 2, 64)
    wanted = reference(queries[:2], cache, batch, window)
    tables = torch.cat((tables, tables[:1]))
    out = torch.full_like(queries, torch.nan)
    ends = torch.cat((ends, torch.zeros(1, dtype=torch.int32)))
    kernels.decode_attention(queries, cache, tables, ends, 4 * attention.SPLIT, window, out)
    assert (out[:2] - wanted).abs().max() <= 1e-5
    assert not out[2].any()
    whole = torch.full_like(queries[:2], torch.nan)
    kernels.ragged_attention(queries[:2], cache, tables[:2], ends[:2], firsts, window, whole)
    assert (whole - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_cache_of_eight_bits(dtype: torch.dtype) -> None:
    """In flash-attn's layout, with scales, against the reference over the values that the codes stand for."""
    sequences = [(40, 1), (7, 5), (60, 1)]
    cache, batch, tables, ends, firsts = paged(sequences, 2, 16, 64, torch.float32)
    scales = tuple(pool.abs().amax(-1) / (127 if dtype == torch.int8 else 448) for pool in (cache.keys, cache.values))
    pools = (pool / scale[..., None] for pool, scale in zip((cache.keys, cache.values), scales, strict=True))
    coded = [(pool.round() if dtype == torch.int8 else pool).to(dtype) for pool in pools]
    meant = KVCache(*(pool.float() * scale[..., None] for pool, scale in zip(coded, scales, strict=True)))
    keys, values = (pool.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for pool in coded)
    stored = KVCache(keys, values, scales=(scales[0], scales[1]))
    queries = torch.randn(int(firsts[-1]), 4, 64)
    wanted = reference(queries, meant, batch, None)
    out = torch.empty_like(queries)
    kernels.ragged_attention(queries, stored, tables, ends, firsts, None, out)
    assert (out - wanted).abs().max() <= 1e-5
    last = (firsts[1:] - 1).long()
    ones = torch.empty_like(queries[last])
    kernels.decode_attention(queries[last], stored, tables, ends, 70, None, ones)
    assert (ones - wanted[last]).abs().max() <= 1e-5
    if dtype == torch.int8:
        with pytest.raises(ValueError, match="scales"):
            kernels.decode_attention(queries[last], KVCache(keys, values), tables, ends, 70, None, ones)


def test_a_query_has_the_same_bits_in_any_batch() -> None:
    sequences = [(70, 1), (5, 9), (33, 20)]
    cache, _, tables, ends, firsts = paged(sequences, 1, 16, 64, torch.float32)
    queries = torch.randn(int(firsts[-1]), 2, 64)
    whole = torch.empty_like(queries)
    kernels.ragged_attention(queries, cache, tables, ends, firsts, None, whole)
    # The last sequence alone, its chunk cut in two.
    first = int(firsts[2])
    for start, count, end in ((0, 6, 39), (6, 14, 53)):
        part = queries[first + start : first + start + count].contiguous()
        out = torch.empty_like(part)
        kernels.ragged_attention(
            part, cache, tables[2:], torch.tensor([end]).int(), torch.tensor([0, count]).int(), None, out
        )
        assert torch.equal(out, whole[first + start : first + start + count])
