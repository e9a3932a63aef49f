"""Compiled paged attention against a float64 softmax; its bits against other batches, chunks, blocks and threads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.native_modules import each_isa, module
from worker.kernels import KVCache, RaggedBatch, ReferenceKernels
from worker.kernels.cpu.attention import paged_attention, plan_attention
from worker.kernels.interface import GREATEST_CODES
from worker.kernels.reference.rope import encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int16]
FIXED_POINT = ("avx512_amx", "avx512_vnni", "avx2")
"""Where queries and weights meet codes in fixed point."""


@dataclass(frozen=True)
class Case:
    """Sequences with their queries; what no sequence wrote is NaN (of codes, their scales), in their last blocks as
    well."""

    cache: KVCache
    tables: list[npt.NDArray[np.int64]]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    queries: Tensor
    """[sum of lengths, Q, D]."""
    written: list[tuple[Tensor, Tensor]]
    """Keys and values of each sequence, [K, positions, D]; of codes, what they stand for."""

    @classmethod
    def make(
        cls,
        sequences: list[tuple[int, int]],
        *,
        kv_heads: int,
        group: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> Case:
        """`sequences`: first position and number of queries. Keys and values don't depend on the block size."""
        generator = torch.Generator().manual_seed(seed)
        written = [
            tuple(torch.randn(kv_heads, start + count, head_dim, generator=generator) for _ in range(2))
            for start, count in sequences
        ]
        starts, lengths = np.array(sequences, np.int64).T
        queries = torch.randn(int(lengths.sum()), kv_heads * group, head_dim, generator=generator)
        needs = -(-(starts + lengths) // block_size)
        num_blocks = int(needs.sum()) + 3
        tables = np.split(torch.randperm(num_blocks, generator=generator).numpy()[:-3], np.cumsum(needs)[:-1])
        shape = (kv_heads, num_blocks, block_size, head_dim)
        coded = not dtype.is_floating_point
        pools = [torch.full(shape, 99 if coded else torch.nan, dtype=dtype) for _ in range(2)]
        scales = torch.full(shape[:3], torch.nan), torch.full(shape[:3], torch.nan)
        cache = KVCache(*pools, scales=scales if coded else None)
        meant = []
        for table, pair in zip(tables, written, strict=True):
            positions = torch.arange(pair[0].shape[1])
            slots = torch.from_numpy(table)[positions // block_size] * block_size + positions % block_size
            for pool, scale, own in zip(pools, scales, pair, strict=True):
                stored, steps = encode(own, dtype) if coded else (own.to(dtype), torch.ones(own.shape[:2]))
                pool.view(kv_heads, -1, head_dim)[:, slots] = stored
                scale.view(kv_heads, -1)[:, slots] = steps
                meant.append(stored.double() * steps[..., None])
        return cls(cache, tables, starts, lengths, queries, list(zip(meant[::2], meant[1::2], strict=True)))

    def batch(self, chosen: list[int], starts: list[int], lengths: list[int]) -> RaggedBatch:
        blocks, block_size = self.cache.keys.shape[1:3]
        tables = [self.tables[index] for index in chosen]
        return RaggedBatch(np.array(starts, np.int64), np.array(lengths, np.int64), tables, blocks, block_size)

    def attend(self, native: ModuleType, window: int | None) -> Tensor:
        """All in one call."""
        batch = self.batch(list(range(len(self.tables))), self.starts.tolist(), self.lengths.tolist())
        return paged_attention(native, self.queries, self.cache, plan_attention(batch), window)

    def attend_in_chunks(self, native: ModuleType, window: int | None, chunk: int) -> Tensor:
        """Sequence by sequence, `chunk` queries a call."""
        parts, row = [], 0
        for index, (start, length) in enumerate(zip(self.starts.tolist(), self.lengths.tolist(), strict=True)):
            for done in range(0, length, chunk):
                count = min(chunk, length - done)
                plan = plan_attention(self.batch([index], [start + done], [count]))
                queries = self.queries[row + done : row + done + count]
                parts.append(paged_attention(native, queries, self.cache, plan, window))
            row += length
        return torch.cat(parts)

    def wanted(self, window: int | None) -> Tensor:
        """In float64, a softmax over all that a query may read."""
        parts, row = [], 0
        for (keys, values), start, count in zip(self.written, self.starts.tolist(), self.lengths.tolist(), strict=True):
            kv_heads, end, head_dim = keys.shape
            distance = torch.arange(start, end)[:, None] - torch.arange(end)[None]
            hidden = (distance < 0) | (distance >= (window or 10**9))
            grouped = self.queries[row : row + count].double().view(count, kv_heads, -1, head_dim)
            scores = torch.einsum("tkgd,ksd->tkgs", grouped, keys.double()) * head_dim**-0.5
            weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
            parts.append(torch.einsum("tkgs,ksd->tkgd", weights, values.double()).reshape(count, -1))
            row += count
        return torch.cat(parts)


SEQUENCES = st.lists(st.tuples(st.integers(0, 600), st.one_of(st.just(1), st.integers(2, 60))), min_size=1, max_size=5)


@each_isa
@settings(max_examples=25, deadline=None)
@given(
    SEQUENCES,
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]),
    st.integers(1, 3),
    st.sampled_from([16, 48, 64, 80, 96, 112, 128, 256]),
    st.sampled_from([1, 4, 16, 32, 64, 256]),
    st.sampled_from([None, None, 1, 30, 257]),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_against_plain_softmax(
    isa: str,
    sequences: list[tuple[int, int]],
    group: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    case = Case.make(
        sequences, kv_heads=kv_heads, group=group, head_dim=head_dim, block_size=block_size, dtype=dtype, seed=seed
    )
    got = case.attend(module(isa), window)
    # Where codes are multiplied in fixed point, queries and weights have 15 bits. Beside codes of 16, queries have what
    # their sum leaves: Gaussian ones' scores are off by some 9e-7 head_dim, mixed values by 1.4e-6 of it.
    bound = 5e-6
    if isa in FIXED_POINT and not dtype.is_floating_point:
        bound = max(5e-4, 1.5e-5 * head_dim) if dtype == torch.int16 else 5e-4
    assert (got.double() - case.wanted(window)).abs().max() <= bound
    assert torch.equal(case.attend_in_chunks(module(isa), window, 1000), got)


@each_isa
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "head_dim"), [(2, 128), (7, 64), (1, 80)])
def test_bits_do_not_depend_on_batch_chunks_blocks_or_threads(
    isa: str, window: int | None, dtype: torch.dtype, group: int, head_dim: int
) -> None:
    sequences = [(0, 300), (511, 1), (250, 20), (1030, 1), (255, 2), (700, 61)]

    def make(block_size: int) -> Case:
        return Case.make(sequences, kv_heads=2, group=group, head_dim=head_dim, block_size=block_size, dtype=dtype)

    together = make(16).attend(module(isa), window)
    assert torch.isfinite(together).all()
    for block_size, threads in ((16, 2), (32, 1), (1, 2), (256, 1)):
        assert torch.equal(make(block_size).attend(module(isa, threads), window), together)
    for chunk in (1, 17, 512):
        assert torch.equal(make(16).attend_in_chunks(module(isa), window, chunk), together)


@each_isa
def test_a_long_decode_is_shared_out_and_keeps_its_bits(isa: str) -> None:
    case = Case.make([(5000, 1)], kv_heads=1, group=3, head_dim=64, block_size=16, dtype=torch.bfloat16)
    shared = case.attend(module(isa, 2), None)
    # Beside many others nothing is split.
    among = Case.make(
        [(5000, 1)] + [(3, 1)] * 40, kv_heads=1, group=3, head_dim=64, block_size=16, dtype=torch.bfloat16
    )
    keys, values = case.written[0]
    slots = torch.from_numpy(among.tables[0]).repeat_interleave(16)[:5001] * 16 + torch.arange(5001) % 16
    among.cache.keys.view(1, -1, 64)[:, slots] = keys.bfloat16()
    among.cache.values.view(1, -1, 64)[:, slots] = values.bfloat16()
    among.queries[0] = case.queries[0]
    assert torch.equal(among.attend(module(isa, 1), None)[:1], shared)
    assert (shared.double() - case.wanted(None)).abs().max() <= 5e-6


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.int16])
def test_agrees_with_the_reference_at_large_scores(isa: str, dtype: torch.dtype) -> None:
    case = Case.make([(0, 40), (300, 1)], kv_heads=2, group=2, head_dim=64, block_size=16, dtype=dtype)
    case.queries.mul_(40.0)
    batch = case.batch([0, 1], case.starts.tolist(), case.lengths.tolist())
    reference = ReferenceKernels()
    wanted = reference.paged_attention(case.queries, case.cache, reference.plan_attention(batch, 2, [None]), None)
    # Scores of hundreds: a 15-bit query moves a weight by a few hundredths, a fiftieth of what 8-bit keys did before.
    bound = 1e-2 if isa in FIXED_POINT and not dtype.is_floating_point else 5e-5
    torch.testing.assert_close(case.attend(module(isa), None), wanted, rtol=2e-4, atol=bound)


@each_isa
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("head_dim", [16, 128, 1024])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_greatest_sums_of_codes(isa: str, dtype: torch.dtype, head_dim: int, sign: float) -> None:
    """Everything is as large as it can be, in 256 keys of one weight: integers hold the sums."""
    case = Case.make([(0, 300)], kv_heads=1, group=2, head_dim=head_dim, block_size=16, dtype=dtype)
    for pool, scale in zip((case.cache.keys, case.cache.values), case.cache.scales or (), strict=True):
        pool.fill_(int(sign * GREATEST_CODES[dtype]))
        scale.fill_(1.0 / GREATEST_CODES[dtype])
    case.queries.fill_(1.0)
    got = case.attend(module(isa), None)
    torch.testing.assert_close(got, torch.full_like(got, sign), rtol=5e-4, atol=0.0)
    # Scores of both signs, each as large as it can be: those of one sign get all the weight there is.
    for chunk in range(0, 300, 16):
        block = int(case.tables[0][chunk // 16])
        for pool in (case.cache.keys, case.cache.values):
            pool[:, block, 1::2] *= -1
    got = case.attend(module(isa), None)[1::2]
    weight = 1.0 / (1.0 + math.exp(-2.0 * head_dim**0.5))
    torch.testing.assert_close(got, torch.full_like(got, 2.0 * weight - 1.0), rtol=1e-3, atol=0.0)


@each_isa
def test_16_bits_keep_more_than_bfloat16(isa: str) -> None:
    errors = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int16):
        case = Case.make([(0, 300), (900, 1)], kv_heads=2, group=2, head_dim=128, block_size=16, dtype=dtype)
        if dtype == torch.float32:
            wanted = case.wanted(None)
        errors[dtype] = float((case.attend(module(isa), None) - wanted).square().mean().sqrt())
    assert errors[torch.int16] < errors[torch.bfloat16] / 4


@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_shows(isa: str, dtype: torch.dtype) -> None:
    """A query that isn't, and a value, in whose scale it shows where values are codes."""
    case = Case.make([(0, 20), (30, 1)], kv_heads=1, group=2, head_dim=64, block_size=16, dtype=dtype)
    case.queries[3, 1, 5] = torch.nan
    case.queries[20, 0, 7] = torch.inf
    got = case.attend(module(isa), None).view(21, 2, 64)
    wanted = torch.ones(21, 2, dtype=torch.bool)
    wanted[3, 1] = wanted[20, 0] = False
    assert torch.equal(got.isfinite().all(-1), wanted) and torch.equal(got.isfinite().any(-1), wanted)
    block, within = int(case.tables[0][0]), 11
    (case.cache.values if case.cache.scales is None else case.cache.scales[1])[0, block, within] = torch.nan
    assert case.attend(module(isa), None)[11:20].isnan().all()


@each_isa
def test_rows_that_no_chunk_has_are_zero_and_strides_are_followed(isa: str) -> None:
    case = Case.make([(5, 3)], kv_heads=1, group=2, head_dim=64, block_size=16, dtype=torch.bfloat16)
    wide = torch.randn(5, 6, 64)
    wide[:3, :2] = case.queries
    plan = plan_attention(case.batch([0], [5], [3]))
    got = paged_attention(module(isa), wide[:, :2], case.cache, plan, None, torch.full((5, 128), torch.nan))
    assert torch.equal(got[:3], case.attend(module(isa), None))
    assert not got[3:].any()


def test_what_it_refuses() -> None:
    native = module("portable")
    cache = KVCache(torch.zeros(2, 1, 16, 64), torch.zeros(2, 1, 16, 64))
    batch = RaggedBatch(np.array([0]), np.array([2]), [np.array([0])], 1, 16)
    plan = plan_attention(batch)
    with pytest.raises(ValueError, match="block_size"):
        plan_attention(RaggedBatch(batch.starts, batch.lengths, batch.block_tables, 1, 48))
    with pytest.raises(ValueError, match="float32"):
        paged_attention(native, torch.zeros(2, 4, 64, dtype=torch.bfloat16), cache, plan, None)
    with pytest.raises(ValueError, match="can't attend"):
        paged_attention(native, torch.zeros(2, 3, 64), cache, plan, None)
    codes = KVCache(cache.keys.to(torch.int8), cache.values.to(torch.int8))
    with pytest.raises(ValueError, match="scales"):
        paged_attention(native, torch.zeros(2, 4, 64), codes, plan, None)
    with pytest.raises(ValueError, match="plan has 2 rows"):
        paged_attention(native, torch.zeros(1, 4, 64), cache, plan, None)
    with pytest.raises(ValueError, match="out"):
        paged_attention(native, torch.zeros(2, 4, 64), cache, plan, None, torch.zeros(2, 64))
