"""gRPC calls that read streams of messages as bytes, over HTTP/2, for a client that takes little of a core."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, StreamEnded, StreamReset, TrailersReceived
from h2.settings import SettingCodes, Settings

FAILURES = ConnectionTerminated, StreamReset, TrailersReceived
"""Of a stream, as trailers are that don't say OK."""


class Connection:
    """gRPC calls on one HTTP/2 connection, without TLS. Data frames are kept as they come; all others are h2's."""

    _FRAME_HEADER, _DATA = 9, 0
    _WINDOW = 2**31 - 1  # of every stream, and of the connection in its life: nobody waits for what was read

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._http = H2Connection(H2Configuration(client_side=True))
        values = {SettingCodes.INITIAL_WINDOW_SIZE: self._WINDOW, SettingCodes.ENABLE_PUSH: 0}
        self._http.local_settings = Settings(client=True, initial_values=values)
        self._http.initiate_connection()
        self._http.increment_flow_control_window(self._WINDOW - 65535)
        self._left = bytearray()  # the beginning of a frame
        self._host = address

    def call(self, method: str, requests: Sequence[bytes]) -> list[list[tuple[float, bytes]]]:
        """The messages of each answer, and when they came. Raises RuntimeError where one doesn't end well."""
        frames: dict[int, list[tuple[float, bytes]]] = {}
        for request in requests:
            stream = self._http.get_next_available_stream_id()
            headers = {":method": "POST", ":scheme": "http", ":path": method, ":authority": self._host}
            headers |= {"te": "trailers", "content-type": "application/grpc"}
            self._http.send_headers(stream, list(headers.items()))
            self._http.send_data(stream, b"\0" + len(request).to_bytes(4, "big") + request, end_stream=True)
            frames[stream] = []
        self._send()
        going = set(frames)
        while going:
            came, now = self._socket.recv(1 << 20), time.perf_counter()
            if not came:
                raise RuntimeError("the connection ended")
            for kind, stream, frame in self._frames(came):
                if kind == self._DATA:
                    frames[stream].append((now, frame[self._FRAME_HEADER :]))
                else:
                    going -= self._take(frame)
        return [_messages(data) for data in frames.values()]

    def _frames(self, came: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Kind, stream and bytes of each frame that is complete."""
        self._left += came
        at = 0
        while len(self._left) >= at + self._FRAME_HEADER:
            end = at + self._FRAME_HEADER + int.from_bytes(self._left[at : at + 3], "big")
            if end > len(self._left):
                break
            yield self._left[at + 3], int.from_bytes(self._left[at + 5 : at + 9], "big"), bytes(self._left[at:end])
            at = end
        del self._left[:at]

    def _take(self, frame: bytes) -> set[int]:
        """Hands a frame to h2, and gives the streams that it ends."""
        events = self._http.receive_data(frame)
        self._send()
        ended: set[int] = set()
        for event in events:
            if isinstance(event, TrailersReceived) and (b"grpc-status", b"0") in event.headers:
                ended.add(event.stream_id)
            elif isinstance(event, FAILURES) or (isinstance(event, StreamEnded) and event.stream_id not in ended):
                raise RuntimeError(f"a stream failed: {events}")
        return ended

    def _send(self) -> None:
        if data := self._http.data_to_send():
            self._socket.sendall(data)


def _messages(data: Sequence[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """gRPC's messages in the data of a stream, each with the time when its last byte came."""
    messages: list[tuple[float, bytes]] = []
    left = b""
    for at, more in data:
        left += more
        while len(left) >= 5 and len(left) >= (end := 5 + int.from_bytes(left[1:5], "big")):
            messages.append((at, left[5:end]))
            left = left[end:]
    return messages
