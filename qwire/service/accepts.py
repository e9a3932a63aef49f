"""How calls are accepted: several at a time, and those that are refused are answered right there.

grpc.aio accepts one call, gives it a task, and only then asks for the next, which takes a thread and four turns of the
event loop for each, however many wait. A call that is refused has by then a second task that watches for its
cancellation, a handler, and a reader of requests. Here `AT_A_TIME` calls are asked for at once, and a refusal is one
write: under overload a call takes two thirds of the processor time, and what has gathered is worked off together.

The place for this in grpc.aio (1.85) isn't public. A release without it accepts calls one by one, and they are refused
by their handlers: slower, with the same answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from qwire.errors import QwireError
from qwire.service import boundary

AT_A_TIME = 8
"""Calls that are asked for at once: of each method that is registered by itself, and of all others together."""
STOP_LOOKS, STOP_LOOK_SECONDS = 20, 0.02
"""How often, when a server stops, it is seen whether calls still wait to be accepted."""

Metadata = Iterable[tuple[str, str | bytes]] | None
Refuse = Callable[[Metadata], QwireError | None]
"""Says of a call, by its metadata, whether it is refused, and how."""


@dataclass(frozen=True, slots=True)
class Refusals:
    """Which calls may be refused while nothing of their request is read."""

    methods: Sequence[str]
    """Such as "/package.Service/Method"."""
    refuse: Refuse


def server(refusals: Refusals | None, **arguments: Any) -> grpc.aio.Server:
    """As `grpc.aio.server`, of which the methods of `refusals` must be registered each by itself."""
    own = cygrpc.AioServer
    cygrpc.AioServer = partial(_AioServer, refusals)
    try:
        return grpc.aio.server(**arguments)
    finally:
        cygrpc.AioServer = own


class _Accepts:
    """Calls of one method, or of all that aren't registered by themselves.

    Args:
        accept: waits for one.
        answered: takes one, unless it is to be handed on.
    """

    def __init__(self, accept: Callable[[], Coroutine[Any, Any, Any]], answered: Callable[[Any], bool]) -> None:
        self._accept = accept
        self._answered = answered
        self._loop = asyncio.get_running_loop()
        self._asked: set[asyncio.Task[Any]] = set()
        self._ready: deque[asyncio.Task[Any]] = deque()
        """Accepted and not handed on. With those that are asked for, never more than `AT_A_TIME`: what comes beside
        them waits in gRPC, which has a limit."""
        self._next: asyncio.Future[Any] | None = None
        """Of a call that grpc.aio waits for."""
        self._ended = False
        for _ in range(AT_A_TIME):
            self._ask()

    def next(self) -> asyncio.Future[Any]:
        """The next call that is to be handled."""
        waiting = self._next = self._loop.create_future()
        self._hand_on()
        return waiting

    def end(self) -> None:
        """No more calls are asked for."""
        self._ended = True

    def answer_ready(self) -> None:
        """Takes back what isn't handed on yet, for from now on all calls are answered."""
        ready, self._ready = self._ready, deque()
        for task in ready:
            self._took(task)

    def _ask(self) -> None:
        if not self._ended:
            task = self._loop.create_task(self._accept())
            self._asked.add(task)  # the loop holds it weakly
            task.add_done_callback(self._took)

    def _took(self, task: asyncio.Task[Any]) -> None:
        self._asked.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        # All that are asked for end so with the server; before that, one that does is asked for anew.
        lost = isinstance(error, cygrpc._RequestCallError) and not self._ended
        if lost or (error is None and self._answered(task.result())):
            self._ask()
        else:
            self._ready.append(task)
            self._hand_on()

    def _hand_on(self) -> None:
        if not self._ready or self._next is None or self._next.done():
            return
        task, waiting, self._next = self._ready.popleft(), self._next, None
        if error := task.exception():
            waiting.set_exception(error)
        else:
            waiting.set_result(task.result())
            self._ask()


class _AioServer(cygrpc.AioServer):  # type: ignore[misc]
    """grpc.aio's, but for how it accepts calls."""

    def __init__(self, refusals: Refusals | None, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._refusals = refusals
        self._accepts: dict[bytes | None, _Accepts] = {}
        self._refusing: set[asyncio.Task[None]] = set()
        self._refused = 0
        self._stopping: QwireError | None = None

    def shutdown(self, grace: float | None) -> Coroutine[Any, Any, None]:
        """Ends the server, which grpc.aio also does with one that is ended, or never began."""
        ending: Coroutine[Any, Any, None] = super().shutdown(grace)
        return ending if self._stopping or not self._accepts else self._answer_and(ending)

    async def _answer_and(self, ending: Coroutine[Any, Any, None]) -> None:
        """Calls that wait to be accepted would be CANCELLED, which nobody tries again: so those are answered first, as
        long as more arrive than are asked for at once."""
        self._stopping = boundary.stopping(retry_after=1.0)
        for accepts in self._accepts.values():
            accepts.answer_ready()
        for _ in range(STOP_LOOKS):
            before = self._refused
            await asyncio.sleep(STOP_LOOK_SECONDS)
            if self._refused - before < AT_A_TIME:
                break
        for accepts in self._accepts.values():
            accepts.end()
        await ending

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """What grpc.aio waits on for the next call of a registered method, or of any other for None."""
        if method not in self._accepts:
            accept = self._request_call if method is None else partial(self._request_registered_call, method)
            refuse = None
            if self._refusals is not None and method is not None and method.decode() in self._refusals.methods:
                refuse = self._refusals.refuse
            self._accepts[method] = _Accepts(accept, partial(self._answered, refuse))
        return self._accepts[method].next()

    def _answered(self, refuse: Refuse | None, call: Any) -> bool:
        """Whether a call was refused."""
        if self._stopping is None and refuse is None:
            return False
        loop = asyncio.get_running_loop()
        context = cygrpc._ServicerContext(call, None, None, loop)
        error = self._stopping
        if error is None and refuse is not None:
            error = refuse(context.invocation_metadata())
        if error is None:
            return False
        self._refused += 1
        task = loop.create_task(_refuse(context, error))
        self._refusing.add(task)
        task.add_done_callback(self._refusing.discard)
        return True


async def _refuse(context: boundary.Context, error: QwireError) -> None:
    try:
        with suppress(grpc.aio.BaseError):  # AbortError always, and what comes of a caller that is gone
            await context.abort(*boundary.ending(error, context))
    finally:
        # gRPC keeps the exception that it raises with the call, and the exception this frame: they would hold each
        # other until the garbage collector comes, which takes tens of milliseconds for a second's refusals.
        del context
