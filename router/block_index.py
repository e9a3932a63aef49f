"""Which workers hold which blocks, for all of a router's workers in one table.

Blocks are known by the first 64 bits of their hash. Under one root equal hashes mean equal prefixes, and roots differ
between models, KV types, block sizes, adapters and scopes, so one table serves every profile. Should two of millions of
blocks share those bits, a request is placed by a hint that is wrong; the worker has the last word.

Memory is two arrays of 64-bit numbers a shard, keys and sets of workers, by open addressing with linear probing: no
object a block. A block takes 21 to 43 bytes, for three to six eighths of the slots are filled. Shards grow one at a
time: no insertion waits for the whole table to be copied.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from qwire.prefix import HASH_BYTES

MAX_WORKERS = 64
"""Of one index: a set of them is one number."""
_SHARD_BITS = 10
_SHIFT = 64 - _SHARD_BITS
_LEAST_SLOTS = 16
_ALL = (1 << MAX_WORKERS) - 1


def keys_of(hashes: bytes) -> array[int]:
    """What the index knows blocks by whose hashes of 16 bytes lie end to end: never 0, which marks a slot that is free.

    Raises ValueError where the bytes are no such hashes.
    """
    if len(hashes) % HASH_BYTES:
        raise ValueError(f"{len(hashes)} bytes of hashes are no multiple of {HASH_BYTES}")
    words = np.frombuffer(hashes, "<u8")[::2]
    return array("Q", np.where(words == 0, 1, words).astype("=u8").tobytes())


class _Shard:
    """A part of the table. A key whose set is empty stays until the shard is built anew."""

    __slots__ = ("keys", "mask", "used", "workers")

    def __init__(self, slots: int = _LEAST_SLOTS) -> None:
        self.keys = array("Q", bytes(8 * slots))
        self.workers = array("Q", bytes(8 * slots))
        self.mask = slots - 1
        self.used = 0

    def slot(self, key: int) -> int:
        """Where the key is, or belongs."""
        keys, mask = self.keys, self.mask
        slot = key & mask
        while (found := keys[slot]) != key and found:
            slot = (slot + 1) & mask
        return slot

    def insert(self, slot: int, key: int) -> int:
        """Takes a free slot for a key; returns which it is now, for the shard may have grown."""
        if 4 * (self.used + 1) > 3 * (self.mask + 1):
            self._rebuild()
            slot = self.slot(key)
        self.keys[slot] = key
        self.used += 1
        return slot

    def drop(self, bit: int) -> None:
        """Takes a worker out of every set."""
        np.bitwise_and(workers := np.frombuffer(self.workers, "=u8"), np.uint64(_ALL ^ bit), out=workers)

    def _rebuild(self) -> None:
        """Without what no worker holds, and filled to three eighths at most."""
        workers = np.frombuffer(self.workers, "=u8")
        kept = np.flatnonzero(workers)
        keys, workers = np.frombuffer(self.keys, "=u8")[kept], workers[kept]
        slots = _LEAST_SLOTS
        while 8 * len(kept) > 3 * slots:
            slots *= 2
        self.keys, self.workers = array("Q", bytes(8 * slots)), array("Q", bytes(8 * slots))
        self.mask, self.used = slots - 1, len(kept)
        homes = (keys & np.uint64(self.mask)).astype(np.int64)
        order = np.argsort(homes, kind="stable")
        # Each goes to its home, or behind the one before it in that order: no free slot lies between.
        places = np.arange(len(kept)) + np.maximum.accumulate(homes[order] - np.arange(len(kept)))
        within = places < slots
        np.frombuffer(self.keys, "=u8")[places[within]] = keys[order[within]]
        np.frombuffer(self.workers, "=u8")[places[within]] = workers[order[within]]
        for index in order[~within]:  # those few begin again at the first slot
            slot = self.slot(key := int(keys[index]))
            self.keys[slot], self.workers[slot] = key, int(workers[index])


class BlockIndex:
    """Blocks of up to `MAX_WORKERS` workers, which are named by numbers from 0."""

    def __init__(self) -> None:
        self._shards = [_Shard() for _ in range(1 << _SHARD_BITS)]

    def add(self, worker: int, keys: Iterable[int]) -> int:
        """Notes blocks that a worker holds; returns how many of them it did not."""
        bit, new, shards = 1 << worker, 0, self._shards
        for key in keys:
            shard = shards[key >> _SHIFT]
            slot = shard.slot(key)
            if not shard.keys[slot]:
                slot = shard.insert(slot, key)
            held = shard.workers[slot]
            if not held & bit:
                shard.workers[slot] = held | bit
                new += 1
        return new

    def discard(self, worker: int, keys: Iterable[int]) -> int:
        """Notes blocks that a worker doesn't hold any more; returns how many of them it did."""
        bit, gone, shards = 1 << worker, 0, self._shards
        for key in keys:
            shard = shards[key >> _SHIFT]
            slot = shard.slot(key)
            if (held := shard.workers[slot]) & bit:
                shard.workers[slot] = held ^ bit
                gone += 1
        return gone

    def drop(self, worker: int) -> None:
        """Forgets all that a worker holds. Takes some milliseconds for millions of blocks."""
        for shard in self._shards:
            shard.drop(1 << worker)

    def leading(self, keys: Sequence[int], workers: Iterable[int]) -> dict[int, int]:
        """How many of a chain's blocks each of some workers holds, up to the first that it doesn't."""
        counts = dict.fromkeys(workers, 0)
        among = sum(1 << worker for worker in counts)
        shards = self._shards
        for index, key in enumerate(keys):
            shard = shards[key >> _SHIFT]
            held = shard.workers[shard.slot(key)] & among
            if held != among:
                for worker in _members(among ^ held):
                    counts[worker] = index
                among = held
                if not among:
                    return counts
        for worker in _members(among):
            counts[worker] = len(keys)
        return counts

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(16 * (shard.mask + 1) for shard in self._shards)


def _members(workers: int) -> Iterator[int]:
    while workers:
        lowest = workers & -workers
        yield lowest.bit_length() - 1
        workers ^= lowest
