"""Routers under ten times the load that their workers can serve: `python -m benchmarks.overload [--seconds 60]
[--routers 1]`.

A fake worker serves about 130 requests a second. First callers ask as many as are served, which gives the peak; then
they ask ten times as many, but no more than `--calls` a second, at random, whatever the answers are. Shown: goodput as
a part of the peak, the time of a refusal at the caller and in the router's own code, how much of a core
the machine's host took meanwhile, and the routers' memory. One router has a core for itself; the fake worker shares the
callers', so that the times at the caller are an upper bound.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import uvloop

from benchmarks.light_calls import LightCalls
from benchmarks.timed_router import TIMES
from qwire.v1 import generation_pb2 as pb
from tests.helpers.fleets import Fleet, Service

METHOD = "/qwire.v1.GenerationService/GenerateOnce"
STEP_MS = 20
TOKENS = (10, 30)
"""The fewest and the most of a request: all are equally likely, lest those that begin together end together."""
REQUESTS = 1000
"""Different ones."""
RUNNING = 63
"""Which would make 150 requests a second, of 21 steps on average, if steps cost nothing besides."""
QUEUED = 64
TIMES_THE_PEAK = 10
SETTLE_SECONDS = 2.0
ARRIVALS_SECONDS = 0.001
"""How far apart arrivals are looked at: what is due then is sent together."""
REFUSED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


@functools.cache
def request(number: int) -> bytes:
    tokens = random.Random(number).randint(*TOKENS)
    asked = pb.GenerateRequest(stop=pb.StopOptions(max_tokens=tokens, ignore_eos=True))
    asked.token_ids.ids.extend([number, 1])
    asked.output.text = False
    return pb.GenerateOnceRequest(request=asked).SerializeToString()


@dataclass
class Seen:
    """What callers saw."""

    served: int = 0
    refused: list[float] = field(default_factory=list)
    """Seconds until each refusal."""
    failed: Counter[int] = field(default_factory=Counter)
    """Calls that ended otherwise, by gRPC's status; -1 where the stream broke."""
    pending: int = 0


class Callers:
    """Those who ask, each router in turn, over a connection to each."""

    def __init__(self, links: Sequence[LightCalls]) -> None:
        self._links = links
        self._numbers = itertools.count()

    def ask(self, seen: Seen, after: Callable[[], None] = lambda: None) -> None:
        """Sends one more request; `after` is called when it has ended."""
        number, started = next(self._numbers), time.perf_counter()
        seen.pending += 1

        def ended(status: int) -> None:
            seen.pending -= 1
            if status == 0:
                seen.served += 1
            elif status == REFUSED:
                seen.refused.append(time.perf_counter() - started)
            else:
                seen.failed[status] += 1
            after()

        self._links[number % len(self._links)].call(request(number % REQUESTS), ended)


def stolen_seconds() -> float:
    """For how long the machine under this one has run others on its cores, since the start, in seconds of a core."""
    return int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")


def at(values: list[float], part: float) -> float:
    """A percentile, in milliseconds."""
    ordered = sorted(values)
    return 1000 * ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def shown(values: list[float]) -> str:
    return f"p50 {at(values, 0.5):.2f} ms, p99 {at(values, 0.99):.2f} ms, longest {at(values, 1):.2f} ms"


async def peak(callers: Callers, seconds: float) -> float:
    """Requests served a second where there are always as many as run, and some that wait."""
    seen = Seen()
    until = time.monotonic() + SETTLE_SECONDS + seconds

    def again() -> None:
        if time.monotonic() < until:
            callers.ask(seen, again)

    for _ in range(RUNNING + QUEUED // 2):
        callers.ask(seen, again)
    await asyncio.sleep(SETTLE_SECONDS)
    before = seen.served
    await asyncio.sleep(seconds)
    rate = (seen.served - before) / seconds
    await settled(seen)
    assert not seen.refused, "the peak is without refusals"
    assert not seen.failed
    return rate


async def settled(seen: Seen) -> None:
    """Returns when every call has ended."""
    while seen.pending:
        await asyncio.sleep(0.01)


async def overload(callers: Callers, seconds: float, calls: float, routers: Routers) -> tuple[Seen, float, list[float]]:
    """What callers saw, requests served a second after the beginning, and the routers' memory in MB by time."""
    seen, memory = Seen(), []
    chance = random.Random(1)
    started = time.monotonic()
    due, first = started, 0
    looks = itertools.count()
    look = next(looks)
    while (now := time.monotonic()) < started + seconds:
        while due <= now:
            callers.ask(seen)
            due += chance.expovariate(calls)
        if now >= started + look * seconds / 6:
            memory.append(routers.megabytes)
            look = next(looks)
        if not first and now >= started + SETTLE_SECONDS:
            first = seen.served or 1
        await asyncio.sleep(max(ARRIVALS_SECONDS, due - time.monotonic()))
    rate = (seen.served - first) / (seconds - SETTLE_SECONDS)
    memory.append(routers.megabytes)
    await settled(seen)
    return seen, rate, memory


class Routers:
    """The processes that are loaded."""

    def __init__(self, services: Sequence[Service]) -> None:
        self.services = services

    @property
    def megabytes(self) -> float:
        return sum(service.memory for service in self.services) / 1e6

    @property
    def cpu_seconds(self) -> float:
        return sum(service.cpu_seconds for service in self.services)


async def measure(arguments: argparse.Namespace, routers: Routers) -> None:
    links = []
    for service in routers.services:
        path = service.address.removeprefix("unix:")
        _, link = await asyncio.get_running_loop().create_unix_connection(functools.partial(LightCalls, METHOD), path)
        links.append(link)
    callers = Callers(links)
    best = await peak(callers, arguments.peak_seconds)
    cpu, own, taken = routers.cpu_seconds, time.process_time(), stolen_seconds()
    calls = min(arguments.calls, TIMES_THE_PEAK * best)
    seen, rate, memory = await overload(callers, arguments.seconds, calls, routers)
    cpu, own, taken = routers.cpu_seconds - cpu, time.process_time() - own, stolen_seconds() - taken
    started = time.monotonic()
    last = Seen()
    callers.ask(last)
    await settled(last)
    after = time.monotonic() - started
    asked = (seen.served + len(seen.refused) + seen.failed.total()) / arguments.seconds
    print(f"peak         {best:.1f} requests/s")
    print(f"overload     {asked:.0f} calls/s for {arguments.seconds:g} s, {asked / best:.1f} times that")
    goodput = f"{rate:.1f} requests/s, {100 * rate / best:.1f}% of the peak"
    print(f"goodput      {goodput}; failed: {dict(seen.failed) or 'none'}")
    print(f"refusals     {len(seen.refused)}; at the caller {shown(seen.refused)}")
    share = cpu / arguments.seconds
    print(f"routers      {100 * share:.0f}% of a core in all, {1e6 * share / asked:.0f} µs a call")
    print(f"callers      {100 * own / arguments.seconds:.0f}% of a core")
    print(f"the host     took {100 * taken / arguments.seconds:.1f}% of a core for others: calls wait while it does")
    print(f"memory       {', '.join(f'{megabytes:.0f}' for megabytes in memory)} MB over the time")
    least, most = (tokens * STEP_MS / 1000 for tokens in TOKENS)
    print(f"afterwards   a request takes {after:.2f} s, of which its steps take {least:.1f} to {most:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--peak-seconds", type=float, default=10.0)
    parser.add_argument("--calls", type=float, default=1500.0, help="a second at most, in all")
    parser.add_argument("--routers", type=int, default=1)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        os.environ[TIMES] = f"{folder}/refusals"
        fleet = Fleet(Path(folder))
        try:
            flags = ("--step-ms", str(STEP_MS), "--max-running", str(RUNNING), "--max-waiting", "16")
            worker = fleet.start_worker(0, *flags, core=cores[-1])
            routers = [
                fleet.start(
                    f"router-{number}",
                    "benchmarks.timed_router",
                    "--worker",
                    worker.address,
                    "--tokenizer",
                    f"unix:{folder}/tokenizer.sock",
                    "--max-queued",
                    str(QUEUED // arguments.routers),
                    "--drain-delay",
                    "0",
                    core=cores[0] if arguments.routers == 1 else None,
                )
                for number in range(arguments.routers)
            ]
            for router in routers:
                router.wait_until_serving()
            os.sched_setaffinity(0, {cores[-1]})
            uvloop.run(measure(arguments, Routers(routers)))
            seconds = []
            for router in routers:
                router.process.send_signal(signal.SIGTERM)
                router.process.wait(30)
                seconds += json.loads(Path(f"{os.environ[TIMES]}.{router.pid}").read_text())
            print(f"             in the router {shown(seconds)}")
        finally:
            fleet.stop()


if __name__ == "__main__":
    main()
