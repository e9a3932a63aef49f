"""Block hashes: known answers, and what makes them names of prefixes."""

from __future__ import annotations

import hashlib
import struct
import time
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwire.prefix import HASH_BYTES, block_hash, block_hashes, extend, root

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=70)
SIZES = st.integers(1, 20)
ROOT = root(b"weights", "float32", 16, "", b"tenant")


def test_known_answers() -> None:
    # Changing any of these orphans every cached block and breaks routers next to older workers.
    assert ROOT.hex() == "ec52f6dfaa6771be948325e7f9ff9210"
    assert block_hash(ROOT, range(16)).hex() == "6245aa20eb54c7543d0908ec7376cf89"
    assert [item.hex() for item in block_hashes(ROOT, range(40), 16)] == [
        "6245aa20eb54c7543d0908ec7376cf89",
        "ed23340cbb3a9eab1ea4f54e5812c0b0",
    ]


def test_the_documented_bytes() -> None:
    fields = [b"qwire.prefix.v1", b"weights", b"float32", struct.pack("<I", 16), b"", b"tenant"]
    data = b"".join(struct.pack("<I", len(field)) + field for field in fields)
    assert hashlib.sha256(data).digest()[:16] == ROOT
    assert block_hash(ROOT, [1, 2**32 - 1]) == hashlib.sha256(ROOT + b"\1\0\0\0\xff\xff\xff\xff").digest()[:16]


def test_roots_differ_in_every_field() -> None:
    roots = {
        root(b"ab", "c", 16, "d", b"e"),
        root(b"a", "bc", 16, "d", b"e"),
        root(b"ab", "cd", 16, "", b"e"),
        root(b"ab", "c", 16, "", b"de"),
        root(b"ab", "c", 16, "de", b""),
        root(b"ab", "c", 17, "d", b"e"),
        root(b"", "abc", 16, "d", b"e"),
        root(b"ab", "", 16, "cd", b"e"),
    }
    assert len(roots) == 8


@given(IDS, SIZES)
def test_only_full_blocks_and_each_follows_the_one_before(ids: list[int], size: int) -> None:
    hashes = block_hashes(ROOT, ids, size)
    assert len(hashes) == len(ids) // size
    parent = ROOT
    for index, value in enumerate(hashes):
        assert len(value) == HASH_BYTES
        parent = block_hash(parent, ids[index * size : (index + 1) * size])
        assert value == parent


@given(IDS, IDS, SIZES)
def test_equal_hashes_mean_equal_prefixes(left: list[int], right: list[int], size: int) -> None:
    a, b = block_hashes(ROOT, left, size), block_hashes(ROOT, right, size)
    for index in range(min(len(a), len(b))):
        end = (index + 1) * size
        assert (a[index] == b[index]) == (left[:end] == right[:end])


@given(IDS, SIZES, st.data())
def test_a_change_shows_in_its_block_and_all_later_ones(ids: list[int], size: int, data: st.DataObject) -> None:
    if not ids:
        return
    place = data.draw(st.integers(0, len(ids) - 1))
    changed = [*ids]
    changed[place] ^= 1
    before, after = block_hashes(ROOT, ids, size), block_hashes(ROOT, changed, size)
    assert [a == b for a, b in zip(before, after, strict=True)] == [i < place // size for i in range(len(before))]


@given(IDS, SIZES)
def test_roots_never_share(ids: list[int], size: int) -> None:
    other = root(b"weights", "float32", 16, "", b"other tenant")
    assert not set(block_hashes(ROOT, ids, size)) & set(block_hashes(other, ids, size))


@given(IDS, SIZES, st.lists(st.integers(0, 70), max_size=5))
def test_extending_bit_by_bit_is_hashing_at_once(ids: list[int], size: int, cuts: list[int]) -> None:
    hashes: list[bytes] = []
    for end in [*sorted(cuts), len(ids)]:
        extend(hashes, ROOT, ids[:end], size)
    assert hashes == block_hashes(ROOT, ids, size)


def test_any_sequence_of_ids() -> None:
    expected = block_hashes(ROOT, [1, 2, 3, 4], 2)
    assert block_hashes(ROOT, (1, 2, 3, 4), 2) == expected
    assert block_hashes(ROOT, array("I", [1, 2, 3, 4]), 2) == expected
    assert block_hashes(ROOT, range(1, 5), 2) == expected


def test_mistakes() -> None:
    for ids in ([-1], [2**32]):
        with pytest.raises(ValueError, match="unsigned"):
            block_hash(ROOT, ids)
    with pytest.raises(ValueError, match="16 bytes"):
        block_hashes(b"short", [1], 1)
    for size in (0, -1):
        with pytest.raises(ValueError, match="block_size"):
            block_hashes(ROOT, [1], size)
        with pytest.raises(ValueError, match="block_size"):
            root(b"", "", size, "", b"")


def test_speed() -> None:
    ids = list(range(4000))
    best = 1.0
    for _ in range(20):
        started = time.perf_counter()
        block_hashes(ROOT, ids, 16)
        best = min(best, time.perf_counter() - started)
    assert best < 0.002, f"{best * 1e6:.0f} µs for 4,000 ids"
