"""Paged attention against a softmax over everything a query may read, and its bits against other batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.kernels import KVCache, RaggedBatch, ReferenceKernels
from worker.kernels.reference import attention

KERNELS = ReferenceKernels()
SEQUENCES = st.lists(st.tuples(st.integers(0, 600), st.one_of(st.just(1), st.integers(2, 60))), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(
    SEQUENCES,
    st.sampled_from([1, 2, 4, 5, 7]),
    st.integers(1, 3),
    st.sampled_from([64, 80, 96, 128]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([None, 1, 30, 257]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_against_plain_softmax(
    sequences: list[tuple[int, int]],
    group: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_blocks = sum(-(-(start + count) // block_size) for start, count in sequences) + 3
    shape = (kv_heads, num_blocks, block_size, head_dim)
    cache = KVCache(*(torch.randn(shape, generator=generator).to(dtype) for _ in range(2)))
    order = torch.randperm(num_blocks, generator=generator).numpy()
    tables, used = [], 0
    for start, count in sequences:
        need = -(-(start + count) // block_size)
        tables.append(order[used : used + need].astype(np.int64))
        used += need
    starts, lengths = np.array(sequences, np.int64).T
    rows = int(lengths.sum())
    padded = -(-rows // 32) * 32
    queries = torch.randn(padded, kv_heads * group, head_dim, generator=generator).to(dtype)

    def run(chosen: list[int], picked: torch.Tensor) -> torch.Tensor:
        batch = RaggedBatch(starts[chosen], lengths[chosen], [tables[i] for i in chosen], num_blocks, block_size)
        return KERNELS.paged_attention(picked, cache, KERNELS.plan_attention(batch, kv_heads, [window]), window)

    got = run(list(range(len(sequences))), queries)
    assert not got[rows:].any()
    row = 0
    for index, (start, count) in enumerate(sequences):
        own = queries[row : row + count]
        keys, values = (
            p[:, tables[index]].flatten(1, 2)[:, : start + count].double() for p in (cache.keys, cache.values)
        )
        distance = torch.arange(start, start + count)[:, None] - torch.arange(start + count)[None]
        hidden = (distance < 0) | (distance >= (window or 10**9))
        grouped = own.double().view(count, kv_heads, group, head_dim)
        scores = torch.einsum("tkgd,ksd->tkgs", grouped, keys) * head_dim**-0.5
        weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
        wanted = torch.einsum("tkgs,ksd->tkgd", weights, values).reshape(count, -1)
        mine = got[row : row + count]
        error = (mine.double() - wanted).abs().max()
        assert error <= (2e-5 if dtype == torch.float32 else 2e-2)
        assert torch.equal(run([index], own.contiguous())[:count], mine)
        row += count


def test_block_size_must_divide_a_tile() -> None:
    batch = RaggedBatch(np.array([0]), np.array([1]), [np.array([0])], 1, 48)
    with pytest.raises(ValueError, match="block_size"):
        KERNELS.plan_attention(batch, 1, [None])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("group", [1, 2, 3, 7])
def test_decodes_alone_or_together_have_the_bits_of_a_prefill(group: int, kv_heads: int, threads: int) -> None:
    """One product alone is cut among threads where several are not."""
    torch.set_num_threads(threads)
    cache = KVCache(*(torch.randn(kv_heads, 60, 16, 64) for _ in range(2)))
    queries = torch.randn(300, kv_heads * group, 64)
    table = np.arange(60)[::-1].copy()

    def run(rows: torch.Tensor, starts: list[int], lengths: list[int]) -> torch.Tensor:
        batch = RaggedBatch(np.array(starts), np.array(lengths), [table] * len(starts), 60, 16)
        return KERNELS.paged_attention(rows, cache, KERNELS.plan_attention(batch, kv_heads, [None]), None)

    wanted = run(queries, [0], [300])
    for place in (0, 7, 16, 255, 256, 299):
        assert torch.equal(run(queries[place : place + 1], [place], [1]), wanted[place : place + 1])
    places = [299, 0, 256, 17]
    assert torch.equal(run(queries[places], places, [1] * 4), wanted[places])
    assert torch.equal(run(queries[30:33], [30], [3]), wanted[30:33])


def test_products_of_other_sizes_are_used_only_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With none allowed but the canonical one, every bit stays."""
    cache = KVCache(*(torch.randn(2, 40, 16, 64) for _ in range(2)))
    queries = torch.randn(303, 6, 64)
    tables = [np.arange(20), np.arange(20, 40), np.arange(20)]
    batch = RaggedBatch(np.array([3, 280, 17]), np.array([301, 1, 1]), tables, 40, 16)

    def run() -> torch.Tensor:
        return KERNELS.paged_attention(queries, cache, KERNELS.plan_attention(batch, 2, [100]), 100)

    wanted = run()
    monkeypatch.setattr(attention, "_tested", {})
    monkeypatch.setattr(attention, "_test", lambda *shape: False)
    assert torch.equal(run(), wanted)
    assert attention._tested


def test_other_bits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    bmm = torch.bmm

    def flawed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Adds in another order at 5 rows."""
        return bmm(left, right) if left.shape[1] != 5 else bmm(left.flip(2), right.flip(1))

    monkeypatch.setattr(torch, "bmm", flawed)
    assert attention._test(8, 3, 2, 64, 1)
    assert not attention._test(5, 3, 2, 64, 1)
