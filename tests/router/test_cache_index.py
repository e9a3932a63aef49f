"""The router's copy of a worker's prefix cache: all of it once the snapshot is there."""

from __future__ import annotations

import pytest

from qwire.v1 import worker_pb2 as pb
from router.block_index import BlockIndex
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
    assert index.leading([1, 3, 2, 4]) == 2
    index.clear()
    assert index.leading([1]) == 0


def test_workers_share_a_table_and_only_whole_snapshots_count() -> None:
    table = BlockIndex()
    first, second = CacheIndex(table, 0), CacheIndex(table, 1)
    first.take(pb.WatchCacheResponse(stored=name(1) + name(2), snapshot=True, snapshot_end=True))
    second.take(pb.WatchCacheResponse(stored=name(1), snapshot=True))
    assert (first.leading([1, 2]), second.leading([1, 2])) == (2, 0)
    second.take(pb.WatchCacheResponse(snapshot=True, snapshot_end=True))
    assert (first.leading([1, 2]), second.leading([1, 2]), len(second)) == (2, 1, 1)
    first.clear()
    assert (first.leading([1, 2]), second.leading([1, 2])) == (0, 1)


def test_bytes_that_are_no_hashes_are_refused() -> None:
    with pytest.raises(ValueError, match="17 bytes"):
        CacheIndex().take(pb.WatchCacheResponse(stored=bytes(17)))
