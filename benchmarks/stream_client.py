"""A light client in a process of its own, which reads streams to their end and says at which rate tokens came.

`python -m benchmarks.stream_client ADDRESS`: each line on standard input is a `Load` as JSON, and for each the answer,
tokens a second, is printed. It stands for callers that are elsewhere, and takes little of the cores that it shares with
the service: it speaks gRPC's HTTP/2 itself, on one connection, and looks into messages when all have come. (Python's
gRPC took 0.6 to 1.2 ms of a core for a step of 8 tokens.)
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import StreamEnded, TrailersReceived
from h2.settings import SettingCodes, Settings

from benchmarks.router_clients import METHOD
from qwire import _child
from qwire.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class Load:
    """Streams that begin at once: how many, of how many tokens, by which seed and vocabulary."""

    batch: int
    prompt: int
    new: int
    vocab: int
    seed: int


class StreamClient:
    """The process, once it is up."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def rate(self, load: Load) -> float:
        """Tokens a second while all streams decode. Raises RuntimeError where one failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(load)) + "\n")
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("a stream failed")
        return float(answer)


@contextmanager
def stream_client(address: str) -> Iterator[StreamClient]:
    """Starts the process, and ends it."""
    argv = [sys.executable, "-m", "benchmarks.stream_client", address]
    with subprocess.Popen(
        _child.command(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield StreamClient(process)  # which ends when its standard input is closed


def _request(load: Load, chance: random.Random) -> bytes:
    request = pb.GenerateRequest(
        sampling=pb.SamplingParams(temperature=0), stop=pb.StopOptions(max_tokens=load.new, ignore_eos=True)
    )
    request.token_ids.ids.extend(chance.randrange(load.vocab) for _ in range(load.prompt))
    return request.SerializeToString()


class _Connection:
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
        for event in events:
            if isinstance(event, TrailersReceived) and (b"grpc-status", b"0") not in event.headers:
                raise RuntimeError(f"a stream failed: {event.headers}")
        return {event.stream_id for event in events if isinstance(event, StreamEnded)}

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


def _rate(streams: list[list[tuple[float, bytes]]]) -> float:
    times: list[list[tuple[float, int]]] = []
    for messages in streams:
        counts = [(at, len(pb.GenerateResponse.FromString(data).delta.token_ids)) for at, data in messages]
        times.append([(at, count) for at, count in counts if count])
    begin, end = max(got[0][0] for got in times), min(got[-1][0] for got in times)
    return sum(count for got in times for at, count in got if begin < at <= end) / (end - begin)


def _serve(address: str) -> None:
    connection = _Connection(address)
    for line in sys.stdin:
        load = Load(**json.loads(line))
        chance = random.Random(load.seed)
        print(_rate(connection.call(METHOD, [_request(load, chance) for _ in range(load.batch)])), flush=True)


if __name__ == "__main__":
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    _serve(sys.argv[1])
