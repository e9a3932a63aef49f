"""Known answers from Random123's kat_vectors, and the noise made of them."""

from __future__ import annotations

import math

import pytest
import torch

from worker.kernels.philox import MAX_GUMBEL, gumbel, philox

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
    zero = torch.tensor(0)
    noise = gumbel(torch.arange(200_000), torch.tensor(3), torch.tensor(1), torch.tensor(42), zero)
    assert noise.dtype == torch.float32 and torch.isfinite(noise).all() and noise.max() <= MAX_GUMBEL
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)


def test_every_input_matters() -> None:
    base = [torch.tensor(value) for value in (5, 6, 7, 8, 9)]
    plain = gumbel(*base)
    for index in range(5):
        changed = list(base)
        changed[index] = changed[index] + 1
        assert gumbel(*changed) != plain
