"""A router's stream, as the worker sees it: its attempts, and the frames that wait to be written to it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from qwire.errors import QwireError, Reason
from qwire.v1 import worker_pb2 as pb

OUTBOX_FRAMES = 1024
"""Frames that wait for one router at most; a link that falls further behind is ended."""


@dataclass(slots=True)
class Link:
    """One router's stream."""

    number: int
    router_id: str
    live: dict[int, set[int]] = field(default_factory=dict)
    """Attempts that the engine has, each with its choices that are not ended."""
    submits_seen: int = 0
    many: bool = False
    """Whether the router has sent several in a frame, and so reads frames that admit several."""
    _outbox: deque[pb.ServeResponse] = field(default_factory=deque)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: bool = False
    _error: Exception | None = None

    def send(self, frame: pb.ServeResponse) -> None:
        if len(self._outbox) < OUTBOX_FRAMES:
            self._outbox.append(frame)
            self._changed.set()
        else:
            self.end(
                QwireError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"over {OUTBOX_FRAMES} frames wait for the router",
                    reason=Reason.SLOW_READER,
                )
            )

    def admitted(self, attempt: int) -> None:
        """Tells the router, in one frame with those before that wait to be told."""
        last = self._outbox[-1] if self._outbox else None
        if self.many and last is not None and last.HasField("admitted"):
            last.admitted.more.append(attempt)
        else:
            self.send(pb.ServeResponse(admitted=pb.Admitted(attempt=attempt)))

    def ended(self, attempt: int, choice: int) -> bool:
        """Notes the end of a choice; whether it was still going on."""
        choices = self.live.get(attempt, set())
        if choice not in choices:
            return False
        choices.discard(choice)
        if not choices:
            del self.live[attempt]
        return True

    def end(self, error: Exception | None = None) -> None:
        """Lets `frames` finish: at once with an error, else after what is there already."""
        self._ended, self._error = True, error
        self._changed.set()

    async def frames(self) -> AsyncIterator[pb.ServeResponse]:
        """Frames to write, until the link is ended. Raises the error that it was ended with."""
        while self._error is None:
            if self._outbox:
                yield self._outbox.popleft()
            elif self._ended:
                return
            else:
                self._changed.clear()
                await self._changed.wait()
        raise self._error
