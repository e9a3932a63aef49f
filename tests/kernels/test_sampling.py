"""Drawing: the sets that filters keep, against a sort; the distribution; ties; independence of the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker.kernels import ReferenceKernels, SamplingBatch
from worker.kernels.philox import gumbel, philox

KERNELS = ReferenceKernels()


def draws(count: int, **given: Any) -> SamplingBatch:
    """`count` rows with the same parameters unless an array is given; seeds 0, 1, …"""

    def rows(name: str, default: Any, dtype: Any) -> npt.NDArray[Any]:
        return np.broadcast_to(np.asarray(given.get(name, default), dtype), (count,)).copy()

    return SamplingBatch(
        temperature=rows("temperature", 1.0, np.float32),
        top_k=rows("top_k", 0, np.int64),
        top_p=rows("top_p", 1.0, np.float64),
        min_p=rows("min_p", 0.0, np.float64),
        seed=rows("seed", np.arange(count), np.uint64),
        choice=rows("choice", 0, np.int64),
        position=rows("position", 0, np.int64),
    )


def draw_from(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """From a copy: a draw may overwrite logits."""
    return KERNELS.sample(logits.contiguous().clone(), batch)


def kept_by_sorting(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The kept ids in order, the naive way."""
    values = (logits / torch.tensor(temperature, dtype=torch.float32)).double()
    ids = sorted(range(len(values)), key=lambda i: (-float(values[i]), i))
    ids = ids[:top_k] if top_k else ids
    weights = torch.exp(values[ids] - values[ids[0]])
    if top_p < 1:
        reached = torch.nonzero(weights.cumsum(0) >= top_p * weights.sum()).flatten()
        ids = ids[: int(reached[0]) + 1]
    return [i for i in ids if float(values[i] - values[ids[0]]) >= (np.log(min_p) if min_p else -np.inf)]


def naive_draw(logits: Tensor, temperature: float, kept: list[int], seed: int, choice: int, position: int) -> int:
    ids = torch.tensor(sorted(kept))
    counter = [torch.tensor(value) for value in (position, choice, 0)]
    key = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)
    words = philox((ids, counter[0], counter[1], counter[2]), key)[0]
    scores = logits[ids] / torch.tensor(temperature, dtype=torch.float32) + gumbel(words)
    return int(ids[int((scores == scores.max()).nonzero()[0])])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 7, 63, 64, 65, 1000, 3000, 20_000]),
    st.floats(0.05, 4.0),
    st.sampled_from([0, 1, 2, 20, 63, 64, 65, 1500, 9000]),
    st.sampled_from([1.0, 0.999, 0.95, 0.5, 0.013, 1e-9]),
    st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    st.sampled_from([0.0, 0.25, 4.0]),
    st.integers(0, 2**64 - 1),
)
def test_draws_what_sorting_would(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, grid: float, seed: int
) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed % 1000)) * 3
    if grid:
        logits = (logits / grid).round() * grid  # many ties
    batch = draws(3, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, position=[0, 1, 2])
    got = draw_from(logits, batch).tolist()
    for row in range(3):
        kept = kept_by_sorting(logits[row], float(np.float32(temperature)), top_k, top_p, min_p)
        # A cut that falls within rounding may go either way.
        for other in (top_p - 1e-6, top_p + 1e-6) if top_p < 1 else ():
            assume(kept == kept_by_sorting(logits[row], float(np.float32(temperature)), top_k, other, min_p))
        assert got[row] == naive_draw(logits[row], float(np.float32(temperature)), kept, seed, 0, row)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
@pytest.mark.parametrize("top_k", [0, 12_000])
def test_flat_distributions_are_cut_exactly(top_k: int, top_p: float) -> None:
    logits = torch.randn(40_000, generator=torch.Generator().manual_seed(5)) * 0.2
    kept = set(kept_by_sorting(logits, 1.0, top_k, top_p, 0.0))
    got = set(draw_from(logits.expand(20, -1), draws(20, top_k=top_k, top_p=top_p)).tolist())
    assert got <= kept
    # The draw among the kept ids is exact too, so the cut is not merely too small.
    for seed in (0, 1):
        wanted = naive_draw(logits, 1.0, sorted(kept), seed, 0, 0)
        assert draw_from(logits[None], draws(1, top_k=top_k, top_p=top_p, seed=seed)).tolist() == [wanted]


def test_distribution_is_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.3, -3.0, 0.9])
    count = 40_000
    tokens = draw_from(logits.expand(count, -1), draws(count, temperature=0.8))
    expected = (logits / 0.8).softmax(-1).double() * count
    observed = torch.bincount(tokens, minlength=len(logits)).double()
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 24.3  # 7 degrees of freedom: passed by chance in all but 1 of 1,000; seeds are fixed


def test_positions_and_choices_are_independent() -> None:
    count = 20_000
    logits = torch.zeros(4).expand(count, -1)
    by_position = draw_from(logits, draws(count, seed=7, position=np.arange(count)))
    by_choice = draw_from(logits, draws(count, seed=7, choice=np.arange(count)))
    pairs = torch.bincount(by_position * 4 + by_choice, minlength=16).double()
    assert float(((pairs - count / 16) ** 2 / (count / 16)).sum()) < 37.7  # 15 degrees of freedom


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(2, 5000)
    logits[1, 4321] = logits[1, 17] = 2.0
    assert draw_from(logits, draws(2, temperature=0.0)).tolist() == [0, 17]
    assert draw_from(logits, draws(2, top_k=1)).tolist() == [0, 17]
    many = draw_from(logits[:1].expand(300, -1), draws(300, top_k=3))
    assert set(many.tolist()) == {0, 1, 2}


def test_rows_do_not_depend_on_the_batch() -> None:
    count, vocab = 24, 30_000
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(count, vocab, generator=generator) * torch.linspace(0.1, 6, count)[:, None]
    batch = draws(
        count,
        temperature=np.resize([0.0, 1.0, 0.7, 2.0, 1.3], count),
        top_k=np.resize([0, 0, 20, 5000], count),
        top_p=np.resize([1.0, 0.9, 0.999], count),
        min_p=np.resize([0.0, 0.01], count),
    )
    together = draw_from(logits, batch)
    torch.set_num_threads(2)
    assert torch.equal(draw_from(logits, batch), together)
    torch.set_num_threads(1)
    for row in range(count):
        one = replace(batch, **{name: getattr(batch, name)[row : row + 1] for name in SamplingBatch.__slots__})
        assert draw_from(logits[row : row + 1], one).tolist() == [int(together[row])]


def test_masked_ids_are_never_drawn() -> None:
    logits = torch.full((200, 2000), -torch.inf)
    logits[:, [3, 1999]] = 0.0
    assert set(draw_from(logits, draws(200, temperature=5.0)).tolist()) == {3, 1999}
    assert set(draw_from(logits, draws(200, top_k=50, top_p=0.99)).tolist()) == {3, 1999}


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_broken_logits_still_give_an_id_and_leave_others_alone(bad: float) -> None:
    logits = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(1))
    batch = draws(2, top_p=0.9)
    fine = int(draw_from(logits, batch)[1])
    logits[0] = bad
    got = draw_from(logits, batch).tolist()
    assert 0 <= got[0] < 20_000 and got[1] == fine


def test_extreme_temperatures() -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)) * 20
    assert torch.equal(draw_from(logits, draws(4, temperature=1e-30)), logits.argmax(-1))
    assert len(set(draw_from(logits[:1].expand(100, -1), draws(100, temperature=1e6)).tolist())) > 90
