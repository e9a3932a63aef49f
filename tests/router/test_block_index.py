"""The table of blocks: it holds what a plain dict of sets would, and grows without losing any."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.block_index import BlockIndex, keys_of

KEYS = st.one_of(
    st.integers(1, 40),  # in one shard, next to each other: they crowd
    st.integers(1, 60).map(lambda number: number << 6),  # with one home while the shard is small
    st.integers(1, 2**64 - 1),
)
CHANGES = st.lists(st.tuples(st.booleans(), st.integers(0, 63), st.lists(KEYS, max_size=30)), max_size=40)


@settings(deadline=None)
@given(CHANGES, st.integers(0, 63), st.lists(KEYS, max_size=12))
def test_it_holds_what_a_dict_would(changes: list[tuple[bool, int, list[int]]], dropped: int, chain: list[int]) -> None:
    index, held = BlockIndex(), [set[int]() for _ in range(64)]
    for stored, worker, keys in changes:
        before = len(held[worker])
        if stored:
            held[worker].update(keys)
            assert index.add(worker, keys) == len(held[worker]) - before
        else:
            held[worker].difference_update(keys)
            assert index.discard(worker, keys) == before - len(held[worker])
    index.drop(dropped)
    held[dropped].clear()

    def leading(chain: list[int]) -> dict[int, int]:
        return {
            worker: next((n for n, key in enumerate(chain) if key not in keys), len(chain))
            for worker, keys in enumerate(held)
        }

    for chain_ in (chain, *([key] for _, _, keys in changes for key in keys)):
        assert index.leading(chain_, range(64)) == leading(chain_)


def spread(first: int, count: int) -> list[int]:
    """Keys that lie as hashes do."""
    return [number * 0x9E37_79B9_7F4A_7C15 % 2**64 for number in range(first + 1, first + count + 1)]


def test_it_grows_and_what_nobody_holds_goes() -> None:
    index = BlockIndex()
    for turn in range(8):
        keys = spread(turn * 5000, 5000)
        assert index.add(turn, keys) == 5000
        assert index.leading(keys, [turn, 63]) == {turn: 5000, 63: 0}
        if turn:
            index.drop(turn)
    assert index.leading(spread(0, 5000), [0]) == {0: 5000}
    # Room for what is held and what was dropped since, not for eight turns'.
    assert index.nbytes <= 16 * 16 * 1024 + 43 * 3 * 5000


def test_a_block_takes_forty_three_bytes_at_most() -> None:
    index = BlockIndex()
    blocks = 100_000
    index.add(0, spread(0, blocks))
    assert index.nbytes <= 43 * blocks


def test_keys_are_the_first_half_of_hashes_and_never_zero() -> None:
    assert keys_of(bytes(16) + (7).to_bytes(8, "little") + bytes(8)) == array("Q", [1, 7])
    assert keys_of(b"") == array("Q")
    with pytest.raises(ValueError, match="17 bytes"):
        keys_of(bytes(17))
