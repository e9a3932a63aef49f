"""The memory that weights, keys and values lie in."""

from __future__ import annotations

from functools import partial
from mmap import PAGESIZE

import torch

from tests.helpers.memory import bytes_in_large_pages, missing, offers_large_pages
from tests.helpers.native_modules import each_isa, module
from tests.helpers.stacks import eventually
from worker.kernels.cpu.memory import populate, zeros

LARGE = 2 << 20


@each_isa
def test_memory_comes_with_what_is_written_or_all_at_once(isa: str) -> None:
    data = zeros(5 * LARGE + 12345)
    assert missing(data) == (5 * LARGE + 12345) // PAGESIZE + 1
    data[LARGE : LARGE + 100] = 7
    assert missing(data) > 4 * LARGE // PAGESIZE
    populate(module(isa), data)
    assert not missing(data)
    expected = torch.zeros_like(data)
    expected[LARGE : LARGE + 100] = 7
    assert data.equal(expected)


@each_isa
def test_all_at_once_in_large_pages(isa: str) -> None:
    def come() -> bool:
        data, before = zeros(5 * LARGE), bytes_in_large_pages()
        populate(module(isa), data)
        return bytes_in_large_pages() >= before + 4 * LARGE

    if offers_large_pages():
        assert eventually(come, 10)  # the system may be short of them for a moment


def test_large_pages_with_what_is_written() -> None:
    def come() -> bool:
        data, before = zeros(5 * LARGE, large=True), bytes_in_large_pages()
        assert missing(data) == 5 * LARGE // PAGESIZE
        data.fill_(1)
        return bytes_in_large_pages() >= before + 4 * LARGE

    if offers_large_pages():
        assert eventually(come, 10)


@each_isa
def test_less_than_a_page(isa: str) -> None:
    data = zeros(3)
    populate(module(isa), data)
    assert data.tolist() == [0, 0, 0]


@each_isa
def test_pages_are_gathered_where_neighbours_meet(isa: str) -> None:
    data = zeros(5 * LARGE)
    before = bytes_in_large_pages()
    data.fill_(1)
    first = data.data_ptr() + -data.data_ptr() % LARGE
    gather = partial(module(isa).gather_pages, first + LARGE // 2, 2 * LARGE)  # half of one, the next, half of a third
    if gather():
        # The system may be short of large pages for a moment.
        assert eventually(lambda: gather() and bytes_in_large_pages() >= before + 3 * LARGE, 10)
    assert bool((data == 1).all())
