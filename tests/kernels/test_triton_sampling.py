"""Draws, masks and edits in Triton against the reference, under the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.helpers.interpreter  # noqa: F401
from worker.kernels import ReferenceKernels, SamplingBatch
from worker.kernels.cuda import triton as kernels
from worker.kernels.interface import Entries, LogitEdits
from worker.kernels.philox import gumbel as reference_gumbel
from worker.kernels.philox import philox

REFERENCE = ReferenceKernels()
ROWS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1e-7, 0.5, 1.0, 30.0]),
        st.sampled_from([0, 1, 3, 40, 10**6]),
        st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
        st.sampled_from([0.0, 0.05, 0.9]),
        st.integers(0, 2**64 - 1),
        st.integers(0, 5),
        st.integers(0, 10**5),
    ),
    min_size=1,
    max_size=2,
)


def draws_of(batch: SamplingBatch) -> kernels.Draws:
    """The batch as kernels take it."""
    arrays = (
        batch.temperature,
        batch.top_k,
        batch.top_p,
        batch.min_p,
        batch.seed.view(np.int64),
        batch.choice,
        batch.position,
    )
    return kernels.Draws(*(torch.from_numpy(array) for array in arrays))


def batch_of(rows: list[tuple[float, int, float, float, int, int, int]]) -> SamplingBatch:
    """One batch of the rows' parameters."""
    dtypes = (np.float32, np.int64, np.float64, np.float64, np.uint64, np.int64, np.int64)
    return SamplingBatch(
        *(np.array(column, dtype) for column, dtype in zip(zip(*rows, strict=True), dtypes, strict=True))
    )


@settings(max_examples=8, deadline=None)
@given(ROWS, st.sampled_from([1, 50, 1024, 1500]), st.sampled_from(["normal", "tied", "masked"]), st.integers(0, 99))
def test_draws_what_the_reference_draws(
    rows: list[tuple[float, int, float, float, int, int, int]], vocabulary: int, shape: str, seed: int
) -> None:
    logits = torch.randn(len(rows), vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    if shape == "tied":
        logits = logits.round()
    elif shape == "masked" and vocabulary > 1:
        logits[:, ::2] = -torch.inf
    batch = batch_of(rows)
    wanted = REFERENCE.sample(logits.clone(), batch)
    got = kernels.sample(logits, draws_of(batch), greedy=not batch.temperature.any(), filtered=True)
    assert got.tolist() == wanted.tolist()


def test_many_numbers_are_those_of_the_reference() -> None:
    """Flat logits: the id with the greatest noise wins, so each draw is a race among all words of a position."""
    rows = [(1.0, 0, 1.0, 0.0, 2**63 + 17 * index, index, 3 * index) for index in range(12)]
    batch = batch_of(rows)
    logits = torch.zeros(len(rows), 3000)
    got = kernels.sample(logits, draws_of(batch), greedy=False, filtered=False)
    assert got.tolist() == REFERENCE.sample(logits.clone(), batch).tolist()
    seeds = [int(seed) for seed in batch.seed]
    for row, token in enumerate(got.tolist()):
        ids, zero = torch.arange(3000), torch.zeros(3000, dtype=torch.int64)
        key = torch.tensor(seeds[row] & 0xFFFFFFFF), torch.tensor(seeds[row] >> 32)
        words = philox((ids, zero + 3 * row, zero + row, zero), key)[0]
        assert int(reference_gumbel(words).argmax()) == token


def test_rows_with_nothing_to_draw_from_take_the_first_of_the_order() -> None:
    logits = torch.full((3, 1100), -torch.inf)
    logits[1, 1050] = torch.nan
    logits[2] = torch.nan
    batch = batch_of([(1.0, 5, 0.9, 0.1, 1, 0, 0)] * 3)
    wanted = REFERENCE.sample(logits.clone(), batch).tolist()
    assert kernels.sample(logits, draws_of(batch), greedy=False, filtered=True).tolist() == wanted == [0, 1050, 0]
    assert kernels.sample(logits, draws_of(batch), greedy=True, filtered=False).tolist() == wanted


@pytest.mark.parametrize("vocabulary", [31, 1100])
def test_edits(vocabulary: int) -> None:
    generator = np.random.default_rng(vocabulary)
    logits = torch.randn(3, vocabulary)
    mask = generator.random((2, vocabulary)) < 0.5

    def entries(count: int) -> Entries:
        places = generator.permutation(3 * vocabulary)[:count]
        return Entries(places // vocabulary, places % vocabulary, generator.random(count).astype(np.float32) + 0.5)

    edits = LogitEdits(entries(20), entries(30), {}, {0: mask[0], 2: mask[1]}, entries(5))
    wanted = logits.clone()
    REFERENCE.edit_logits(wanted, edits)

    def tensors(of: Entries) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.from_numpy(of.rows), torch.from_numpy(of.ids), torch.from_numpy(of.values)

    kernels.penalize_repeated(logits, *tensors(edits.repeated))
    kernels.add_to_logits(logits, *tensors(edits.added))
    padded = np.pad(mask, ((0, 0), (0, -vocabulary % 32)))
    words = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32).copy())
    kernels.mask_logits(logits, torch.tensor([0, 2]), words)
    kernels.ban(logits, *tensors(edits.banned)[:2])
    assert torch.equal(logits, wanted)
