"""Edits of logits and log-probabilities against the same written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.kernels.interface import Entries, LogitEdits
from worker.kernels.reference import ReferenceKernels

KERNELS = ReferenceKernels()


def entries(items: list[tuple[int, int, float]]) -> Entries:
    rows, ids, values = zip(*items, strict=True) if items else ((), (), ())
    return Entries(np.array(rows, np.int64), np.array(ids, np.int64), np.array(values, np.float32))


pairs = st.tuples(st.integers(0, 3), st.integers(0, 19))
edit_lists = st.lists(st.tuples(pairs, st.floats(0.25, 4, width=32)), unique_by=lambda item: item[0], max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    repeated=edit_lists,
    added=edit_lists,
    banned=edit_lists,
    allowed=st.dictionaries(st.integers(0, 3), st.lists(st.integers(0, 19), min_size=1, unique=True), max_size=2),
    masks=st.dictionaries(st.integers(0, 3), st.lists(st.booleans(), min_size=20, max_size=20), max_size=2),
    seed=st.integers(0, 99),
)
def test_edits(
    repeated: list[tuple[tuple[int, int], float]],
    added: list[tuple[tuple[int, int], float]],
    banned: list[tuple[tuple[int, int], float]],
    allowed: dict[int, list[int]],
    masks: dict[int, list[bool]],
    seed: int,
) -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed))
    expected = logits.clone()
    for (row, token), value in repeated:
        found = expected[row, token]
        expected[row, token] = found / value if found > 0 else found * value
    for (row, token), value in added:
        expected[row, token] += value
    for row, ids in allowed.items():
        for token in set(range(20)) - set(ids):
            expected[row, token] = -torch.inf
    for row, mask in masks.items():
        for token, open_ in enumerate(mask):
            if not open_:
                expected[row, token] = -torch.inf
    for (row, token), _ in banned:
        expected[row, token] = -torch.inf

    def flat(items: list[tuple[tuple[int, int], float]]) -> Entries:
        return entries([(row, token, value) for (row, token), value in items])

    edits = LogitEdits(
        flat(repeated),
        flat(added),
        {row: np.array(ids, np.int64) for row, ids in allowed.items()},
        {row: np.array(mask, np.bool_) for row, mask in masks.items()},
        flat(banned),
    )
    KERNELS.edit_logits(logits, edits)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_logprobs(count: int) -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * 4
    tokens = torch.tensor([7, 0, 299])
    drawn, ids, values = KERNELS.logprobs(logits, tokens, count)
    oracle = logits.double().log_softmax(-1)
    assert torch.allclose(drawn.double(), oracle[torch.arange(3), tokens], atol=1e-5)
    assert ids.shape == values.shape == (3, count)
    for row in range(3):
        order = sorted(range(300), key=lambda token: (-logits[row, token].item(), token))[:count]
        assert ids[row].tolist() == order
        assert torch.allclose(values[row].double(), oracle[row, order], atol=1e-5)


def test_ties_go_by_id() -> None:
    logits = torch.zeros(1, 3000)
    logits[0, [5, 2000, 17]] = 1.0
    _, ids, _ = KERNELS.logprobs(logits, torch.tensor([0]), 6)
    assert ids.tolist() == [[5, 17, 2000, 0, 1, 2]]


def test_bits_do_not_depend_on_the_batch() -> None:
    logits = torch.randn(17, 49_152, generator=torch.Generator().manual_seed(1)) * 3
    tokens = torch.arange(17)
    together = KERNELS.logprobs(logits, tokens, 4)
    for row in range(17):
        alone = KERNELS.logprobs(logits[row : row + 1].clone(), tokens[row : row + 1], 4)
        assert all(torch.equal(one[0], many[row]) for one, many in zip(alone, together, strict=True))
