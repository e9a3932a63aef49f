"""What the prefix cache holds, told to the routers that watch it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import grpc

from qwire.errors import QwireError, Reason
from qwire.prefix import HASH_BYTES
from qwire.v1 import worker_pb2 as pb
from worker.engine.block_pool import CacheChanges

MESSAGE_HASHES = 65_000
"""Hashes of one message: a little under 1 MiB."""
BACKLOG_HASHES = 65_536
"""Changes that wait for one watcher at most. The snapshot isn't counted: it has one hash a KV block at most."""


@dataclass(slots=True, eq=False)
class _Watcher:
    messages: deque[pb.WatchCacheResponse] = field(default_factory=deque)
    changes: int = 0
    """Hashes in those of `messages` that are no snapshot."""
    begun: bool = False
    """Whether the snapshot is among what was told."""
    error: QwireError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class CacheFeed:
    """Everyone who watches one worker's cache. Lives on the event loop.

    Args:
        watch: asks the engine for a snapshot and changes, or for no more of them.
    """

    def __init__(self, watch: Callable[[bool], None]) -> None:
        self._watch = watch
        self._watchers: list[_Watcher] = []

    def take(self, snapshot: list[bytes] | None, changes: CacheChanges) -> None:
        """Takes in what one step reported: the changes, and the snapshot behind them if it had one."""
        for watcher in self._watchers:
            if watcher.error is not None:
                continue
            if watcher.begun:
                watcher.changes += len(changes.stored) + len(changes.removed)
                watcher.messages += _change_messages(changes)
            elif snapshot is not None:
                watcher.begun = True
                watcher.messages += _snapshot_messages(snapshot)
            if watcher.changes > BACKLOG_HASHES:
                watcher.messages.clear()
                watcher.error = QwireError(
                    grpc.StatusCode.DATA_LOSS,
                    f"over {BACKLOG_HASHES} changes of the cache were not read: watch anew",
                    reason=Reason.SLOW_READER,
                )
            watcher.changed.set()

    def end(self, error: QwireError) -> None:
        """Ends every watch, and with it all of its messages."""
        for watcher in self._watchers:
            watcher.error = watcher.error or error
            watcher.changed.set()

    async def messages(self) -> AsyncIterator[pb.WatchCacheResponse]:
        """One watcher's messages, without end. Raises QwireError when it fell behind, or by `end`."""
        watcher = _Watcher()
        self._watchers.append(watcher)
        try:
            self._watch(True)
            while watcher.error is None:
                if watcher.messages:
                    message = watcher.messages.popleft()
                    if not message.snapshot:
                        watcher.changes -= (len(message.stored) + len(message.removed)) // HASH_BYTES
                    yield message
                else:
                    watcher.changed.clear()
                    await watcher.changed.wait()
            raise watcher.error
        finally:
            self._watchers.remove(watcher)
            if not self._watchers:
                self._watch(False)


def _change_messages(changes: CacheChanges) -> Iterator[pb.WatchCacheResponse]:
    for part in _parts(changes.removed):
        yield pb.WatchCacheResponse(removed=part)
    for part in _parts(changes.stored):
        yield pb.WatchCacheResponse(stored=part)


def _snapshot_messages(hashes: list[bytes]) -> list[pb.WatchCacheResponse]:
    messages = [pb.WatchCacheResponse(stored=part, snapshot=True) for part in _parts(hashes) or [b""]]
    messages[-1].snapshot_end = True
    return messages


def _parts(hashes: list[bytes]) -> list[bytes]:
    return [b"".join(hashes[start : start + MESSAGE_HASHES]) for start in range(0, len(hashes), MESSAGE_HASHES)]
