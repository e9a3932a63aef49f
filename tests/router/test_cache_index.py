"""The router's copy of a worker's prefix cache: all of it once the snapshot is there."""

from __future__ import annotations

import pytest

from qwire.v1 import worker_pb2 as pb
from router.cache_index import CacheIndex


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def test_a_snapshot_counts_once_it_is_complete() -> None:
    index = CacheIndex()
    index.take(pb.WatchCacheResponse(stored=name(1), snapshot=True))
    assert (len(index), index.complete) == (0, False)
    index.take(pb.WatchCacheResponse(stored=name(2), snapshot=True, snapshot_end=True))
    assert (len(index), index.complete) == (2, True)
    index.take(pb.WatchCacheResponse(stored=name(3) + name(4), removed=name(2)))
    assert index.leading([name(1), name(3), name(2), name(4)]) == 2
    index.clear()
    assert index.leading([name(1)]) == 0


def test_bytes_that_are_no_hashes_are_refused() -> None:
    with pytest.raises(ValueError, match="17 bytes"):
        CacheIndex().take(pb.WatchCacheResponse(stored=bytes(17)))
