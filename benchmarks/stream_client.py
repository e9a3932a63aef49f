"""A light client in a process of its own, which reads streams to their end and says at which rate tokens came.

`python -m benchmarks.stream_client ADDRESS`: each line on standard input is a `Load` as JSON, and for each the answer,
tokens a second, is printed. It stands for callers that are elsewhere, and takes little of the cores that it shares with
the service: 0.2 ms of a core for a step of 8 tokens, where Python's gRPC took 0.6 to 1.2. Messages are parsed when all
have come.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from benchmarks.raw_grpc import Connection
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


def _rate(streams: list[list[tuple[float, bytes]]]) -> float:
    times: list[list[tuple[float, int]]] = []
    for messages in streams:
        counts = [(at, len(pb.GenerateResponse.FromString(data).delta.token_ids)) for at, data in messages]
        times.append([(at, count) for at, count in counts if count])
    begin, end = max(got[0][0] for got in times), min(got[-1][0] for got in times)
    return sum(count for got in times for at, count in got if begin < at <= end) / (end - begin)


def _serve(address: str) -> None:
    connection = Connection(address)
    for line in sys.stdin:
        load = Load(**json.loads(line))
        chance = random.Random(load.seed)
        print(_rate(connection.call(METHOD, [_request(load, chance) for _ in range(load.batch)])), flush=True)


if __name__ == "__main__":
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    _serve(sys.argv[1])
