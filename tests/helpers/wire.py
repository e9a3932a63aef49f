"""Protobuf wire format by hand, for messages that the library would not write."""

from __future__ import annotations

from typing import Any


def varint(value: int) -> bytes:
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])


def field_bytes(number: int, value: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def raw_stream(channel: Any, method: str) -> Any:
    """A server-streaming method over raw bytes, of either kind of channel."""
    return channel.unary_stream(method)


def raw_unary(channel: Any, method: str) -> Any:
    """A unary method over raw bytes, of either kind of channel."""
    return channel.unary_unary(method)
