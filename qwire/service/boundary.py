"""What stands before every method: bytes in, typed errors out.

grpc parses requests before a handler sees them and answers UNKNOWN with the name of a Python class when that fails,
and it sends the text of an uncaught exception to the caller. So methods are registered over raw bytes and parsed
here, where a failure can be named; and whatever a handler raises becomes a status from the catalogue.

It is no interceptor of grpc.aio, for which every call makes a chain of closures that only the garbage collector can
take apart.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from qwire.errors import FieldViolation, QwireError, Reason

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Deserializer = Callable[[bytes], Any]

SEARCHED_FIELDS = 10_000
"""Fields and messages of a request that are looked at to name those that are unknown."""

Ending = tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]
"""A call's status, text and trailing metadata: what `abort` takes."""


class OpenEndedCalls:
    """Calls that end only when the caller wants: health's Watch, and those that stream requests. A server that stops
    would wait for them in vain, so it ends them itself."""

    def __init__(self) -> None:
        self._scopes: set[asyncio.Timeout] = set()
        self._ended = False

    def end(self) -> None:
        """Ends them all UNAVAILABLE, and those that are still to come."""
        self._ended = True
        for scope in self._scopes:
            scope.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Encloses such a call."""
        if self._ended:
            raise stopping()
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._scopes.add(scope)
                try:
                    yield
                finally:
                    self._scopes.discard(scope)
        except TimeoutError:
            raise (stopping() if scope.expired() else TimeoutError) from None


class Writes:
    """Bounds how long one write may be stuck, by looks at all streams: a timer for each message would cost more than
    what the message holds.

    Looks are counted rather than seconds, for a process that was stopped and woken finds its clock ahead.
    """

    LOOKS = 10
    """A write over so many looks is stuck."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._streams: set[StreamWrites] = set()
        self._looking: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[StreamWrites]:
        """Encloses a stream of messages. Raises QwireError RESOURCE_EXHAUSTED where a write is stuck."""
        scope = asyncio.timeout(None)
        stream = StreamWrites(scope)
        try:
            async with scope:
                self._streams.add(stream)
                if self._looking is None:
                    self._look_later()
                try:
                    yield stream
                finally:
                    self._streams.discard(stream)
        except TimeoutError:
            if not scope.expired():
                raise
            raise QwireError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the stream was not read for {self.timeout:g} s",
                reason=Reason.SLOW_READER,
            ) from None

    def _look_later(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(self.timeout / self.LOOKS, self._look)

    def _look(self) -> None:
        self._looking = None
        for stream in self._streams:
            if stream.writing:
                stream.looks += 1
                if stream.looks > self.LOOKS:
                    stream.scope.reschedule(asyncio.get_running_loop().time())
        if self._streams:
            self._look_later()


class StreamWrites:
    """One stream's. `writing` is true, and `looks` counts, while a message is handed to gRPC."""

    __slots__ = ("looks", "scope", "writing")

    def __init__(self, scope: asyncio.Timeout) -> None:
        self.scope = scope
        self.writing = False
        self.looks = 0


class Boundary(grpc.GenericRpcHandler):
    """Parses requests, refuses unknown fields, bounds writes, and turns exceptions into statuses.

    Generated code registers services with it as with a server. A message that a caller hasn't taken after
    `write_timeout` seconds ends its stream RESOURCE_EXHAUSTED.
    """

    def __init__(self, write_timeout: float) -> None:
        self.open_ended = OpenEndedCalls()
        self._writes = Writes(write_timeout)
        self.methods: dict[str, Any] = {}
        """What answers calls of a method, such as "/package.Service/Method"."""

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Nothing: they are those that generated code registers by their names as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        for name, handler in handlers.items():
            method = f"/{service}/{name}"
            self.methods[method] = self._guarded(method, handler)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """What answers a call; None, for gRPC's UNIMPLEMENTED, where it is of no method."""
        return self.methods.get(details.method)

    def _guarded(self, method: str, handler: Any) -> Any:
        answer = _Guard(method, handler, self._writes, self.open_ended).answer
        serialize = handler.response_serializer
        match handler.request_streaming, handler.response_streaming:
            case True, True:
                return grpc.stream_stream_rpc_method_handler(answer, None, serialize)
            case True, False:
                return grpc.stream_unary_rpc_method_handler(answer, None, serialize)
            case False, True:
                return grpc.unary_stream_rpc_method_handler(answer, None, serialize)
            case _:
                return grpc.unary_unary_rpc_method_handler(answer, None, serialize)


class _Guard:
    """One method's behaviour over raw bytes."""

    def __init__(self, method: str, handler: Any, writes: Writes, open_ended: OpenEndedCalls) -> None:
        self._method = method
        self._behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        self._request_streaming = handler.request_streaming
        self._call = self._stream if handler.response_streaming else self._once
        self._parse = _parser(handler.request_deserializer)
        self._writes = writes
        self._open_ended = open_ended

    async def answer(self, request: Any, context: Context) -> Any:
        try:
            return await self._call(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            last = self._ending(error, context)
        try:
            await context.abort(*last)
        finally:
            # gRPC keeps the exception that it raises with the call, and the exception this frame: they would hold each
            # other until the garbage collector comes, which takes tens of milliseconds for a second's refusals.
            del request, context

    async def _once(self, request: Any, context: Context) -> Any:
        return await self._behaviour(self._prepare(request), context)

    async def _stream(self, request: Any, context: Context) -> None:
        result = self._behaviour(self._prepare(request), context)
        if inspect.isawaitable(result):  # a handler that writes by itself: health's Watch
            async with self._open_ended.call():
                await result
        elif self._request_streaming:
            async with self._open_ended.call():
                await self._write_all(context, result)
        else:
            await self._write_all(context, result)

    def _prepare(self, request: Any) -> Any:
        return _parse_each(request, self._parse) if self._request_streaming else self._parse(request)

    async def _write_all(self, context: Context, result: Any) -> None:
        write = context.write
        async with self._writes.stream() as stream, aclosing(result) as messages:
            async for message in messages:
                stream.looks, stream.writing = 0, True
                await write(message)
                stream.writing = False

    def _ending(self, error: Exception, context: Context) -> Ending:
        if not isinstance(error, QwireError):
            log.error("%s failed", self._method, exc_info=error)
            error = QwireError(grpc.StatusCode.INTERNAL, "the server failed; its log says more", reason=Reason.INTERNAL)
        return ending(error, context)


def stopping(retry_after: float | None = None) -> QwireError:
    """What calls hear that the server's end meets."""
    return QwireError(
        grpc.StatusCode.UNAVAILABLE, "the server is shutting down", reason=Reason.DRAINING, retry_after=retry_after
    )


def ending(error: QwireError, context: Context) -> Ending:
    """How a call ends with an error."""
    return error.code, error.message, error.trailing_metadata(context.time_remaining())


def unknown_fields(message: Message, path: str = "", budget: Iterator[int] | None = None) -> Iterator[str]:
    """Paths of fields in `message` that its type doesn't have, such as `sampling.#99`.

    Looks at the first thousands of fields and messages: there may be millions, and the event loop waits.
    """
    budget = iter(range(SEARCHED_FIELDS)) if budget is None else budget
    prefix = f"{path}." if path else ""
    unknown: Iterable[Any] = UnknownFieldSet(message)  # type: ignore[assignment]
    for _, field in zip(budget, unknown, strict=False):
        yield f"{prefix}#{field.field_number}"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        if isinstance(value, Message):
            yield from unknown_fields(value, prefix + descriptor.name, budget)
        else:
            for _, (index, item) in zip(budget, enumerate(value), strict=False):
                yield from unknown_fields(item, f"{prefix}{descriptor.name}[{index}]", budget)


def _parser(deserialize: Deserializer) -> Deserializer:
    def parse(data: bytes) -> Any:
        try:
            message = deserialize(data)
        except DecodeError:
            raise QwireError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "the bytes of the request are no message of this method's request type, or hold text that is no UTF-8",
                reason=Reason.MALFORMED_MESSAGE,
            ) from None
        if isinstance(message, Message) and message.DESCRIPTOR.full_name.startswith("qwire."):
            _refuse_unknown_fields(message)
        return message

    return parse


def _refuse_unknown_fields(message: Message) -> None:
    size = message.ByteSize()
    trimmed = type(message)()
    trimmed.CopyFrom(message)
    trimmed.DiscardUnknownFields()  # type: ignore[no-untyped-call, unused-ignore]
    if trimmed.ByteSize() != size:
        raise QwireError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "the request holds fields that this server doesn't know",
            reason=Reason.UNKNOWN_FIELD,
            violations=[FieldViolation(path, "this server doesn't know the field") for path in unknown_fields(message)],
        )


async def _parse_each(stream: AsyncIterator[bytes], parse: Deserializer) -> AsyncIterator[Any]:
    async for data in stream:
        yield parse(data)
