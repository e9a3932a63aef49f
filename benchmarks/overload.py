"""A router under ten times the load that its workers can serve: `python -m benchmarks.overload [--seconds 60]`.

Fake workers serve 150 requests a second. First callers ask as many as are served, which gives the peak; then callers
ask `--calls` times a second, at random, whatever the answers are. Shown: goodput as a part of the peak, the time of a
refusal at the caller and from the start of the router's handler, and the router's memory. Router and callers run on a
core each; the fake worker shares the callers', so that the times at the caller are an upper bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import uvloop

from benchmarks.timed_router import TIMES
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import generation_pb2_grpc
from tests.helpers.fleets import Fleet

STEP_MS = 20
TOKENS = 20
RUNNING = 63
"""Which makes about 150 requests a second, of a step more than their tokens."""
QUEUED = 64
SETTLE_SECONDS = 2.0


def request(number: int) -> pb.GenerateOnceRequest:
    asked = pb.GenerateRequest(stop=pb.StopOptions(max_tokens=TOKENS, ignore_eos=True))
    asked.token_ids.ids.extend([number % 1000, number // 1000 % 1000, 1])
    asked.output.text = False
    return pb.GenerateOnceRequest(request=asked)


@dataclass
class Seen:
    """What callers saw."""

    served: int = 0
    refused: list[float] = field(default_factory=list)
    """Seconds until each refusal."""
    failed: Counter[str] = field(default_factory=Counter)
    """Calls that ended otherwise, by status."""

    async def ask(self, stub: generation_pb2_grpc.GenerationServiceAsyncStub, number: int) -> None:
        started = time.perf_counter()
        try:
            await stub.GenerateOnce(request(number))
            self.served += 1
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.refused.append(time.perf_counter() - started)
            else:
                self.failed[error.code().name] += 1


def at(values: list[float], part: float) -> float:
    """A percentile, in milliseconds."""
    ordered = sorted(values)
    return 1000 * ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def shown(values: list[float]) -> str:
    return f"p50 {at(values, 0.5):.2f} ms, p99 {at(values, 0.99):.2f} ms, longest {at(values, 1):.2f} ms"


async def peak(stub: generation_pb2_grpc.GenerationServiceAsyncStub, seconds: float) -> float:
    """Requests served a second by callers that are always as many as run, and some that wait."""
    seen = Seen()
    numbers = iter(range(10**9))
    until = time.monotonic() + SETTLE_SECONDS + seconds

    async def caller() -> None:
        while time.monotonic() < until:
            await seen.ask(stub, next(numbers))

    callers = asyncio.gather(*(caller() for _ in range(RUNNING + QUEUED // 2)))
    await asyncio.sleep(SETTLE_SECONDS)
    before = seen.served
    await asyncio.sleep(seconds)
    rate = (seen.served - before) / seconds
    await callers
    assert not seen.refused, "the peak is without refusals"
    assert not seen.failed
    return rate


async def overload(
    stub: generation_pb2_grpc.GenerationServiceAsyncStub, seconds: float, calls: float, fleet: Fleet
) -> tuple[Seen, float, list[float]]:
    """What callers saw, requests served a second after the beginning, and the router's memory in MB by time."""
    seen, memory, tasks = Seen(), [], set()
    chance = random.Random(1)
    started = time.monotonic()
    due, number, settled = started, 10**6, 0
    looks = iter(range(10**6))
    look = next(looks)
    while (now := time.monotonic()) < started + seconds:
        while due <= now:
            task = asyncio.create_task(seen.ask(stub, number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += chance.expovariate(calls)
            number += 1
        if now >= started + look * seconds / 6:
            memory.append(fleet.services["router-0"].memory / 1e6)
            look = next(looks)
        if not settled and now >= started + SETTLE_SECONDS:
            settled = seen.served or 1
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    rate = (seen.served - settled) / (seconds - SETTLE_SECONDS)
    memory.append(fleet.services["router-0"].memory / 1e6)
    await asyncio.gather(*tasks)
    return seen, rate, memory


async def measure(arguments: argparse.Namespace, fleet: Fleet) -> None:
    address = fleet.services["router-0"].address
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        best = await peak(stub, arguments.peak_seconds)
        cpu = fleet.services["router-0"].cpu_seconds
        seen, rate, memory = await overload(stub, arguments.seconds, arguments.calls, fleet)
        cpu = fleet.services["router-0"].cpu_seconds - cpu
        started = time.monotonic()
        await Seen().ask(stub, 1)
        after = time.monotonic() - started
    asked = (seen.served + len(seen.refused) + seen.failed.total()) / arguments.seconds
    print(f"peak         {best:.1f} requests/s")
    print(f"overload     {asked:.0f} calls/s for {arguments.seconds:g} s, {asked / best:.1f} times that")
    goodput = f"{rate:.1f} requests/s, {100 * rate / best:.1f}% of the peak"
    print(f"goodput      {goodput}; failed: {dict(seen.failed) or 'none'}")
    print(f"refusals     {len(seen.refused)}; at the caller {shown(seen.refused)}")
    share = cpu / arguments.seconds
    print(f"router       {100 * share:.0f}% of its core, {1e6 * share / asked:.0f} µs a call")
    print(f"memory       {', '.join(f'{megabytes:.0f}' for megabytes in memory)} MB over the time")
    print(f"afterwards   a request takes {after:.2f} s, {TOKENS * STEP_MS / 1000:.2f} s of which are its steps'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--peak-seconds", type=float, default=10.0)
    parser.add_argument("--calls", type=float, default=1500.0, help="a second, in all")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        os.environ[TIMES] = f"{folder}/refusals.json"
        fleet = Fleet(Path(folder))
        try:
            flags = ("--step-ms", str(STEP_MS), "--max-running", str(RUNNING), "--max-waiting", "16")
            worker = fleet.start_worker(0, *flags, core=cores[-1])
            router = fleet.start(
                "router-0",
                "benchmarks.timed_router",
                "--worker",
                worker.address,
                "--tokenizer",
                f"unix:{folder}/tokenizer.sock",
                "--max-queued",
                str(QUEUED),
                "--drain-delay",
                "0",
                core=cores[0],
            )
            router.wait_until_serving()
            os.sched_setaffinity(0, {cores[-1]})
            os.nice(10)  # callers that are in want of time wait, not the worker
            uvloop.run(measure(arguments, fleet))
            router.process.send_signal(signal.SIGTERM)
            router.process.wait(30)
            print(f"             from the handler's start {shown(json.loads(Path(os.environ[TIMES]).read_text()))}")
        finally:
            fleet.stop()


if __name__ == "__main__":
    main()
