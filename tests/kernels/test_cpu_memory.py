"""The memory that weights, keys and values lie in."""

from __future__ import annotations

from mmap import PAGESIZE
from types import ModuleType

import pytest
import torch

from tests.helpers.memory import missing
from worker.kernels.cpu import native
from worker.kernels.cpu.memory import populate, zeros

LARGE = 2 << 20


@pytest.fixture
def kernels() -> ModuleType:
    _, module = native.load("auto")
    return module


def test_memory_comes_with_what_is_written_or_all_at_once(kernels: ModuleType) -> None:
    data = zeros(5 * LARGE + 12345)
    assert missing(data) == (5 * LARGE + 12345) // PAGESIZE + 1
    data[LARGE : LARGE + 100] = 7
    assert missing(data) > 4 * LARGE // PAGESIZE
    populate(kernels, data)
    assert not missing(data)
    expected = torch.zeros_like(data)
    expected[LARGE : LARGE + 100] = 7
    assert data.equal(expected)


def test_less_than_a_page(kernels: ModuleType) -> None:
    data = zeros(3)
    populate(kernels, data)
    assert data.tolist() == [0, 0, 0]
