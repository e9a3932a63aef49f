"""What the prefix cache holds, told to the routers that watch it."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc

from qwire.errors import QwireError, Reason
from qwire.v1 import worker_pb2 as pb
from worker.engine.block_pool import CacheChanges

MESSAGE_HASHES = 65_000
"""Hashes of one message: a little under 1 MiB."""
BACKLOG_HASHES = 65_536
"""Changes that wait for one watcher at most. The snapshot isn't counted: it has one hash a KV block at most."""
GATHER_SECONDS = 0.05
"""Between two messages to one watcher. What a message costs, on both sides, doesn't depend on how many changes it has,
and what it says is a hint."""


@dataclass(slots=True, eq=False)
class _Watcher:
    snapshot: deque[pb.WatchCacheResponse] = field(default_factory=deque)
    """What of it is still to be told."""
    begun: bool = False
    """Whether there was one: changes before it are part of it."""
    stored: dict[bytes, None] = field(default_factory=dict)
    removed: dict[bytes, None] = field(default_factory=dict)
    """What has changed beyond what was told, and beyond the snapshot. No hash is in both."""
    error: QwireError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def behind(self) -> int:
        """How many changes are still to be told."""
        return len(self.stored) + len(self.removed)

    def take(self, changes: CacheChanges) -> None:
        for hashes, into, out_of in (
            (changes.removed, self.removed, self.stored),
            (changes.stored, self.stored, self.removed),
        ):
            for name in hashes:
                out_of.pop(name, None)
                into[name] = None

    def message(self) -> pb.WatchCacheResponse | None:
        """The next one, if there is anything to tell. Removals first: nobody is to hold more than the cache does."""
        if self.snapshot:
            return self.snapshot.popleft()
        if not self.behind:
            return None
        removed = _first(self.removed, MESSAGE_HASHES)
        stored = _first(self.stored, MESSAGE_HASHES - len(removed))
        return pb.WatchCacheResponse(removed=b"".join(removed), stored=b"".join(stored))


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
                watcher.take(changes)
            elif snapshot is not None:
                watcher.begun = True
                watcher.snapshot += _snapshot_messages(snapshot)
            if watcher.behind > BACKLOG_HASHES:
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
                if (message := watcher.message()) is not None:
                    yield message
                    if not watcher.snapshot:
                        await asyncio.sleep(GATHER_SECONDS)
                else:
                    watcher.changed.clear()
                    await watcher.changed.wait()
            raise watcher.error
        finally:
            self._watchers.remove(watcher)
            if not self._watchers:
                self._watch(False)


def _snapshot_messages(hashes: list[bytes]) -> list[pb.WatchCacheResponse]:
    starts = range(0, len(hashes), MESSAGE_HASHES) or [0]
    parts = (b"".join(hashes[start : start + MESSAGE_HASHES]) for start in starts)
    messages = [pb.WatchCacheResponse(stored=part, snapshot=True) for part in parts]
    messages[-1].snapshot_end = True
    return messages


def _first(hashes: dict[bytes, None], count: int) -> list[bytes]:
    """Takes out the first `count` of them."""
    taken = list(itertools.islice(hashes, count))
    for name in taken:
        del hashes[name]
    return taken
