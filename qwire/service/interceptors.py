"""One interceptor around every method: bytes in, typed errors out.

grpc parses requests before a handler sees them and answers UNKNOWN with the name of a Python class when that fails,
and it sends the text of an uncaught exception to the caller. So methods are registered over raw bytes and parsed
here, where a failure can be named; and whatever a handler raises becomes a status from the catalogue.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from qwire.errors import FieldViolation, QwireError, Reason

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Deserializer = Callable[[bytes], Any]


class BoundaryInterceptor(grpc.aio.ServerInterceptor):
    """Parses requests, refuses unknown fields, bounds writes, and turns exceptions into statuses.

    A message that a caller hasn't taken after `write_timeout` seconds ends its stream RESOURCE_EXHAUSTED.
    """

    def __init__(self, write_timeout: float) -> None:
        self._write_timeout = write_timeout

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # grpc answers UNIMPLEMENTED
        guard = _Guard(handler_call_details.method, handler, self._write_timeout)
        serialize = handler.response_serializer
        match handler.request_streaming, handler.response_streaming:
            case True, True:
                return grpc.stream_stream_rpc_method_handler(guard.stream, None, serialize)
            case True, False:
                return grpc.stream_unary_rpc_method_handler(guard.unary, None, serialize)
            case False, True:
                return grpc.unary_stream_rpc_method_handler(guard.stream, None, serialize)
            case _:
                return grpc.unary_unary_rpc_method_handler(guard.unary, None, serialize)


class _Guard:
    """One method's behaviour over raw bytes."""

    def __init__(self, method: str, handler: Any, write_timeout: float) -> None:
        self._method = method
        self._behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        self._request_streaming = handler.request_streaming
        self._parse = _parser(handler.request_deserializer)
        self._write_timeout = write_timeout

    async def unary(self, request: Any, context: Context) -> Any:
        try:
            return await self._behaviour(self._prepare(request), context)
        except Exception as error:
            await self._end(context, error)

    async def stream(self, request: Any, context: Context) -> None:
        try:
            result = self._behaviour(self._prepare(request), context)
            if inspect.isawaitable(result):  # a handler that writes by itself: health's Watch
                await result
                return
            async with aclosing(result) as messages:
                async for message in messages:
                    await self._write(context, message)
        except Exception as error:
            await self._end(context, error)

    def _prepare(self, request: Any) -> Any:
        return _parse_each(request, self._parse) if self._request_streaming else self._parse(request)

    async def _write(self, context: Context, message: Any) -> None:
        try:
            async with asyncio.timeout(self._write_timeout):
                await context.write(message)
        except TimeoutError:
            raise QwireError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the stream was not read for {self._write_timeout:g} s",
                reason=Reason.SLOW_READER,
            ) from None

    async def _end(self, context: Context, error: Exception) -> None:
        """Ends the call with a status. Never returns: grpc raises."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if not isinstance(error, QwireError):
            log.error("%s failed", self._method, exc_info=error)
            error = QwireError(grpc.StatusCode.INTERNAL, "the server failed; its log says more", reason=Reason.INTERNAL)
        await context.abort(error.code, error.message, error.trailing_metadata())


def unknown_fields(message: Message, path: str = "") -> list[str]:
    """Paths of fields in `message` that its type doesn't have, such as `sampling.#99`."""
    prefix = f"{path}." if path else ""
    found = [f"{prefix}#{field.field_number}" for field in UnknownFieldSet(message)]  # type: ignore[attr-defined]
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        if isinstance(value, Message):
            found += unknown_fields(value, prefix + descriptor.name)
        else:
            for index, item in enumerate(value):
                found += unknown_fields(item, f"{prefix}{descriptor.name}[{index}]")
    return found


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
