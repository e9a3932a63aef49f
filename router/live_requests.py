"""The streams that a router serves now: how many there may be, and which request ids they have."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from qwire.errors import QwireError, Reason
from router.journal import Journal

OVERLOADED_RETRY_SECONDS = 1.0
SUPERSEDED_SECONDS = 1.0
"""How long a request waits for the one that it supersedes to give back its place. One that is stuck in a write to a
client that is gone isn't waited for."""


class LiveRequest:
    """One stream's place and id."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.ended = asyncio.Event()
        self._superseded: QwireError | None = None
        self._journal: Journal | None = None

    def attach(self, journal: Journal) -> None:
        """Names what is to be failed once the stream is superseded. Raises QwireError where it is already."""
        self._journal = journal
        self.check()

    def check(self) -> None:
        """Raises QwireError where the stream is superseded."""
        if self._superseded is not None:
            raise self._superseded

    def supersede(self) -> None:
        """Ends the stream ABORTED at its next chance."""
        self._superseded = QwireError(
            grpc.StatusCode.ABORTED, "the request was sent again under the same request_id", reason=Reason.SUPERSEDED
        )
        if self._journal is not None:
            self._journal.fail(self._superseded)


class LiveRequests:
    """At most `limit` streams, no two of a tenant with one id but for one that is being superseded."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._by_id: dict[tuple[str, str], LiveRequest] = {}
        """By tenant and request id."""

    def __len__(self) -> int:
        return self._count

    @asynccontextmanager
    async def admit(self, tenant: str, request_id: str | None, *, again: bool) -> AsyncIterator[LiveRequest]:
        """Holds one of the places, and the id among the tenant's, which is made up for None.

        Args:
            again: the call was sent before and may supersede a live one of its id.

        Raises:
            QwireError: RESOURCE_EXHAUSTED without a free place, ALREADY_EXISTS where the id is live.
        """
        if self._count >= self._limit:
            raise QwireError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._limit} streams are served already",
                reason=Reason.OVERLOADED,
                retry_after=OVERLOADED_RETRY_SECONDS,
            )
        request_id = uuid.uuid4().hex if request_id is None else request_id
        name = tenant, request_id
        older = self._by_id.get(name)
        if older is not None and not again:
            raise QwireError(
                grpc.StatusCode.ALREADY_EXISTS,
                "a live request has this request_id",
                reason=Reason.DUPLICATE_REQUEST_ID,
            )
        live = self._by_id[name] = LiveRequest(request_id)
        self._count += 1
        try:
            if older is not None:
                older.supersede()
                await _wait(older.ended, SUPERSEDED_SECONDS)
                live.check()
            yield live
        finally:
            self._count -= 1
            live.ended.set()
            if self._by_id.get(name) is live:
                del self._by_id[name]


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
