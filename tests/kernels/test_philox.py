"""Known answers from Random123's kat_vectors, and the noise made of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.native_modules import each_isa, module
from worker.kernels.cpu.select import NativeSelection
from worker.kernels.philox import MAX_GUMBEL, gumbel, philox
from worker.kernels.reference.sampling import TORCH, Counters

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([word] * 5) for word in counter)
    words = philox((c0, c1, c2, c3), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert all(" ".join(f"{int(word[lane]):08x}" for word in words) == expected for lane in range(5))


def test_gumbel_is_gumbel() -> None:
    words = words_of(torch.arange(200_000), 3, 1, 42)
    noise = gumbel(words)
    assert torch.equal(words, words_of(torch.arange(200_000), 3, 1, 42))
    assert noise.dtype == torch.float32 and torch.isfinite(noise).all() and noise.max() <= MAX_GUMBEL
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)


def test_every_input_matters() -> None:
    plain = words_of(torch.tensor([5]), 6, 7, 8 + (9 << 32))
    for changed in ((6, 6, 7, 8, 9), (5, 7, 7, 8, 9), (5, 6, 8, 8, 9), (5, 6, 7, 9, 9), (5, 6, 7, 8, 10)):
        token, position, choice, low, high = changed
        assert words_of(torch.tensor([token]), position, choice, low + (high << 32)) != plain


@each_isa
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5), st.integers(0, 99))
def test_compiled_words_are_these(isa: str, count: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids, of = (torch.randint(high, (count,), generator=generator) for high in (2**18, rows))
    position, choice, seeds = (
        torch.randint(low, high, (rows,), generator=generator)
        for low, high in ((0, 2**31), (0, 16), (-(2**63), 2**63 - 1))
    )
    counters = Counters(position, choice, seeds)
    for threads in (1, 2):
        words = NativeSelection(module(isa, threads)).words(ids, of, counters)
        assert torch.equal(words, TORCH.words(ids, of, counters))


def words_of(ids: torch.Tensor, position: int, choice: int, seed: int) -> torch.Tensor:
    counters = Counters(*(torch.tensor([value]) for value in (position, choice, seed)))
    return TORCH.words(ids, torch.zeros_like(ids), counters)
