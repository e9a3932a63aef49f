"""The pause that a client sees when its worker dies or hangs: `python -m benchmarks.gaps {killed,stopped}`.

Two fake workers with eight streams; in each trial one of them is killed, or stopped, and the longest pause of each
stream that moved is noted. To compute prompt and ids again costs the fake nothing, so what is shown is the pause beyond
that, a step of 10 ms included.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import uvloop

from benchmarks.overload import at
from qwire import AsyncClient
from qwire.aio_client import AsyncGeneration
from tests.helpers.fleets import Fleet, fake_fleet

STREAMS = 8
FLAGS = ("--step-ms", "10", "--token-us", "0")


async def read(stream: AsyncGeneration, times: list[float]) -> None:
    async for _ in stream:
        times.append(time.perf_counter())


async def trial(fleet: Fleet, how: str, number: int, chance: random.Random) -> list[float]:
    """The longest pause of each stream that moved, in seconds."""
    name = f"worker-{number % 2}"
    worker = fleet.services[name]
    async with AsyncClient(fleet.services["router-0"].address) as client:
        streams = [
            client.generate(token_ids=[number, each], max_tokens=20_000, ignore_eos=True, text=False)
            for each in range(STREAMS)
        ]
        times: list[list[float]] = [[] for _ in streams]
        reading = [asyncio.create_task(read(*pair)) for pair in zip(streams, times, strict=True)]
        while not all(len(each) >= 20 for each in times):
            await asyncio.sleep(0.01)
        await asyncio.sleep(chance.uniform(0, 0.5))
        struck = time.perf_counter()
        if how == "killed":
            worker.kill()
        else:
            os.kill(worker.pid, signal.SIGSTOP)
        # Until every stream has come as far again.
        while not all(each[-1] > struck + (0.5 if how == "killed" else 3.0) for each in times):
            await asyncio.sleep(0.01)
            assert time.perf_counter() < struck + 30
        await asyncio.sleep(0.5)
        for task in reading:
            task.cancel()
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    if how == "stopped":
        os.kill(worker.pid, signal.SIGCONT)
    else:
        fleet.start_worker(number % 2, *FLAGS).wait_until_serving()
    while not all(worker.ready and not worker.streams for worker in fleet.workers()):
        await asyncio.sleep(0.02)
    gaps = []
    for each in times:
        after = [moment for moment in each if moment > struck]
        before = max(moment for moment in each if moment <= struck)
        gaps.append(max(later - earlier for earlier, later in zip([before, *after], after, strict=False)))
    return [gap for gap in gaps if gap > 0.035]  # the others went on as if nothing had been


async def measure(fleet: Fleet, how: str, trials: int) -> None:
    chance = random.Random(1)
    gaps: list[float] = []
    for number in range(trials):
        gaps += await trial(fleet, how, number, chance)
    print(
        f"{how}: {trials} trials, {len(gaps)} streams with a pause: p50 {at(gaps, 0.5):.0f} ms, "
        f"p90 {at(gaps, 0.9):.0f} ms, p99 {at(gaps, 0.99):.0f} ms, longest {at(gaps, 1):.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=["killed", "stopped"])
    parser.add_argument("--trials", type=int, default=25)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fake_fleet(Path(folder), worker_flags=FLAGS) as fleet:
        uvloop.run(measure(fleet, arguments.how, arguments.trials))


if __name__ == "__main__":
    main()
