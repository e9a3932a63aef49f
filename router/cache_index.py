"""What one worker's prefix cache holds, as far as the router knows: a hint for placement, never a promise."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence

import grpc

from qwire.prefix import HASH_BYTES
from qwire.v1 import worker_pb2 as pb
from qwire.v1 import worker_pb2_grpc

log = logging.getLogger(__name__)

REOPEN_SECONDS = 0.2
"""Between the end of a watch and the next: a worker that is asked for snapshots all the time gets nothing else done."""


class CacheIndex:
    """The hashes of the blocks that a worker can hit now. Never more than the worker has KV blocks, by its contract."""

    def __init__(self) -> None:
        self._held: set[bytes] = set()
        self._snapshot: set[bytes] | None = set()
        """What came of the snapshot; None once it is complete."""

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held(self) -> frozenset[bytes]:
        """All of them, as they are now."""
        return frozenset(self._held)

    @property
    def complete(self) -> bool:
        """Whether this is all that the worker holds, as of its last message."""
        return self._snapshot is None

    def leading(self, hashes: Sequence[bytes]) -> int:
        """How many of a chain's blocks the worker holds, up to the first that it doesn't."""
        held = self._held
        return next((index for index, block_hash in enumerate(hashes) if block_hash not in held), len(hashes))

    def clear(self) -> None:
        """Forgets everything; the next message begins a snapshot."""
        self._held = set()
        self._snapshot = set()

    def take(self, message: pb.WatchCacheResponse) -> None:
        """Takes in a message of the watch. Raises ValueError where its hashes are none."""
        stored = _hashes(message.stored)
        if self._snapshot is None:
            self._held.difference_update(_hashes(message.removed))
            self._held.update(stored)
            return
        self._snapshot.update(stored)
        if message.snapshot_end:
            self._held, self._snapshot = self._snapshot, None

    async def follow(self, stub: worker_pb2_grpc.WorkerServiceAsyncStub) -> None:
        """Watches the worker's cache, and again whenever the watch ends, until cancelled; then nothing is held."""
        try:
            while True:
                try:
                    async for message in stub.WatchCache(pb.WatchCacheRequest()):
                        self.take(message)
                except grpc.aio.AioRpcError as error:
                    if self.complete:  # not each time that a worker can't be watched at all
                        log.info("watch of a cache ended: %s", error.code().name)
                except ValueError as error:
                    log.error("watch of a cache broken by the worker: %s", error)
                self.clear()
                await asyncio.sleep(REOPEN_SECONDS)
        finally:
            self.clear()


def _hashes(data: bytes) -> Iterator[bytes]:
    if len(data) % HASH_BYTES:
        raise ValueError(f"{len(data)} bytes of hashes are no multiple of {HASH_BYTES}")
    return (data[start : start + HASH_BYTES] for start in range(0, len(data), HASH_BYTES))
