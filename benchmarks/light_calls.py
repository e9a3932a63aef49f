"""Unary gRPC calls that cost their caller next to nothing: frames of HTTP/2 made once and sent again and again.

For loads that are to be a server's and not their generator's: a call by grpc takes as much of a core to make as to
answer. Of HTTP/2 (RFC 9113) and HPACK (RFC 7541) this speaks what such calls need and no more: one connection, requests
without compression or indexing, and of an answer the status alone, which is found because the connection's settings
leave the server no table to index by.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import cast

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_HEADER_TABLE_SIZE, _INITIAL_WINDOW = 1, 4
_LARGE = 2**31 - 1
_FIRST_WINDOW = 65_535
_STATUS = b"grpc-status"

Ended = Callable[[int], None]
"""What is called with a call's gRPC status, or -1 where the stream or the connection broke."""


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(text: bytes) -> bytes:
    if len(text) > 126:
        raise ValueError("a longer string takes more than a byte of length")
    return bytes([len(text)]) + text


class LightCalls(asyncio.Protocol):
    """Calls of one method over one connection, in the order in which they are made.

    Args:
        method: such as "/package.Service/Method".
    """

    def __init__(self, method: str, authority: str = "localhost") -> None:
        # Indexes are those of HPACK's static table: POST, http, :path, :authority, content-type.
        self._headers = b"".join(
            (
                b"\x83\x86",
                b"\x04" + _literal(method.encode()),
                b"\x01" + _literal(authority.encode()),
                b"\x0f\x10" + _literal(b"application/grpc"),
                b"\x00" + _literal(b"te") + _literal(b"trailers"),
            )
        )
        self._transport: asyncio.WriteTransport | None = None
        self._next = 1
        self._received = b""
        self._waiting: dict[int, Ended] = {}
        self._room = _FIRST_WINDOW
        """Bytes that the server still takes."""

    def call(self, message: bytes, ended: Ended) -> None:
        """Sends a request. Raises RuntimeError where the server doesn't take its bytes any more."""
        data = b"\0" + struct.pack(">I", len(message)) + message
        self._room -= len(data)
        if self._transport is None or self._room < 0:
            raise RuntimeError("the connection is not open, or the server doesn't read it")
        stream, self._next = self._next, self._next + 2
        self._waiting[stream] = ended
        self._transport.write(
            _frame(_HEADERS, _END_HEADERS, stream, self._headers) + _frame(_DATA, _END_STREAM, stream, data)
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        settings = struct.pack(">HIHI", _HEADER_TABLE_SIZE, 0, _INITIAL_WINDOW, _LARGE)
        window = struct.pack(">I", _LARGE - _FIRST_WINDOW)
        self._transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW, 0, 0, window))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        waiting, self._waiting = self._waiting, {}
        for ended in waiting.values():
            ended(-1)

    def data_received(self, data: bytes) -> None:
        received, at = self._received + data, 0
        while len(received) - at >= 9:
            length = int.from_bytes(received[at : at + 3], "big")
            if len(received) - at < 9 + length:
                break
            kind, flags, stream = struct.unpack_from(">BBI", received, at + 3)
            self._take(kind, flags, stream, received[at + 9 : at + 9 + length])
            at += 9 + length
        self._received = received[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _HEADERS and flags & _END_STREAM:
            if not flags & _END_HEADERS:
                raise RuntimeError("headers in more than one frame")
            self._end(stream, _status(payload))
        elif kind == _RESET:
            self._end(stream, -1)
        elif kind == _WINDOW and stream == 0:
            self._room += int.from_bytes(payload, "big")
        elif kind in (_SETTINGS, _PING) and not flags & _ACK and self._transport is not None:
            self._transport.write(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        elif kind == _GOAWAY:
            raise RuntimeError(f"the server ends the connection: {payload[8:]!r}")

    def _end(self, stream: int, status: int) -> None:
        ended = self._waiting.pop(stream, None)
        if ended is not None:
            ended(status)


def _status(block: bytes) -> int:
    """The gRPC status of a block of headers that are literals."""
    at = block.find(_STATUS)
    if at < 0:
        raise RuntimeError("no status where a call ends")
    at += len(_STATUS)
    return int(block[at + 1 : at + 1 + block[at]])
