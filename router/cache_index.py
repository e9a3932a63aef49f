"""What one worker's prefix cache holds, as far as the router knows: a hint for placement, never a promise."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence

import grpc

from qwire.v1 import worker_pb2 as pb
from qwire.v1 import worker_pb2_grpc
from router.block_index import BlockIndex, keys_of

log = logging.getLogger(__name__)

PIECE = 2048
"""Blocks that are taken in at once: a few milliseconds."""

REOPEN_SECONDS = 0.2
"""Between the end of a watch and the next: a worker that is asked for snapshots all the time gets nothing else done."""


class CacheIndex:
    """The blocks that one worker can hit now. Never more than the worker has KV blocks, by its contract.

    Args:
        blocks: where they are kept, with those of other workers; a table of its own if there is none.
        worker: the worker's number there.
    """

    def __init__(self, blocks: BlockIndex | None = None, worker: int = 0) -> None:
        self.blocks = BlockIndex() if blocks is None else blocks
        self.worker = worker
        self.complete = False
        """Whether this is all that the worker holds, as of its last message. Before that it counts for nothing."""
        self._count = 0

    def __len__(self) -> int:
        return self._count if self.complete else 0

    def leading(self, keys: Sequence[int]) -> int:
        """How many of a chain's blocks the worker holds, up to the first that it doesn't."""
        return self.blocks.leading(keys, [self.worker])[self.worker] if self.complete else 0

    def clear(self) -> None:
        """Forgets everything; the next message begins a snapshot."""
        self.complete = False
        if self._count:
            self.blocks.drop(self.worker)
            self._count = 0

    def take(self, message: pb.WatchCacheResponse) -> None:
        """Takes in a message of the watch. Raises ValueError where its hashes are none."""
        for _ in self._take(message):
            pass

    def _take(self, message: pb.WatchCacheResponse) -> Iterator[None]:
        """As `take`, in pieces that keep nobody waiting."""
        stored, removed = keys_of(message.stored), keys_of(message.removed)
        for start in range(0, len(removed), PIECE):
            self._count -= self.blocks.discard(self.worker, removed[start : start + PIECE])
            yield
        for start in range(0, len(stored), PIECE):
            self._count += self.blocks.add(self.worker, stored[start : start + PIECE])
            yield
        self.complete = self.complete or message.snapshot_end

    async def follow(self, stub: worker_pb2_grpc.WorkerServiceAsyncStub) -> None:
        """Watches the worker's cache, and again whenever the watch ends, until cancelled; then nothing is held."""
        try:
            while True:
                try:
                    async for message in stub.WatchCache(pb.WatchCacheRequest()):
                        for _ in self._take(message):
                            if message.snapshot:
                                await asyncio.sleep(0)
                except grpc.aio.AioRpcError as error:
                    if self.complete:  # not each time that a worker can't be watched at all
                        log.info("watch of a cache ended: %s", error.code().name)
                except ValueError as error:
                    log.error("watch of a cache broken by the worker: %s", error)
                self.clear()
                await asyncio.sleep(REOPEN_SECONDS)
        finally:
            self.clear()
