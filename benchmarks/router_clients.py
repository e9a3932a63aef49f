"""Light clients that hold many streams open and note when each message came: raw bytes, parsed afterwards.

A process of its own: `python -m benchmarks.router_clients ADDRESS... --streams N --seconds S`. Prints `ready` once all
streams have begun, measures for S seconds from the next line on its standard input, and prints what it saw as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter

import grpc
import uvloop

from benchmarks.stamping_worker import age
from qwire.v1 import generation_pb2 as pb

METHOD = "/qwire.v1.GenerationService/Generate"
STREAMS_A_CONNECTION = 128


def request(number: int, prompt_tokens: int, max_tokens: int, text: bool) -> bytes:
    message = pb.GenerateRequest(
        sampling=pb.SamplingParams(seed=number, temperature=1.0),
        stop=pb.StopOptions(max_tokens=max_tokens, ignore_eos=True),
        output=pb.OutputOptions(text=text),
    )
    message.token_ids.ids.extend([number % 30_000, *range(prompt_tokens - 1)])
    return message.SerializeToString()


async def run(arguments: argparse.Namespace) -> None:
    streams: int = arguments.streams
    began = 0
    all_began, over = asyncio.Event(), asyncio.Event()
    arrivals: list[tuple[int, float, bytes]] = []
    measuring = False
    channels = [
        grpc.aio.insecure_channel(
            arguments.addresses[number % len(arguments.addresses)], options=[("grpc.use_local_subchannel_pool", 1)]
        )
        for number in range(max(len(arguments.addresses), -(-streams // STREAMS_A_CONNECTION)))
    ]
    clock = time.monotonic

    async def read(number: int) -> None:
        nonlocal began
        method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channels[number % len(channels)].unary_stream(METHOD)
        call = method(request(number, arguments.prompt_tokens, arguments.max_tokens, arguments.text))
        count = 0
        async for data in call:
            count += 1
            if count == 2:  # Accepted, and the first delta
                began += 1
                if began == streams:
                    all_began.set()
            if measuring:
                arrivals.append((number, clock(), data))
        if not over.is_set():
            raise RuntimeError(f"stream {number} ended before the measurement did")

    tasks = []
    for number in range(streams):
        tasks.append(asyncio.create_task(read(number)))
        if number % 16 == 15:
            await asyncio.sleep(arguments.stagger)
    waiting = asyncio.create_task(all_began.wait())
    await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
    if not all_began.is_set():
        raise RuntimeError(f"a stream failed: {[task.exception() for task in tasks if task.done()][:1]}")
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    measuring = True
    started = clock()
    await asyncio.sleep(arguments.seconds)
    measuring = False
    seconds = clock() - started
    print(json.dumps(report(arrivals, seconds)), flush=True)
    await asyncio.to_thread(sys.stdin.readline)  # streams stay open until whoever measures has looked
    over.set()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def report(arrivals: list[tuple[int, float, bytes]], seconds: float) -> dict[str, float]:
    """Counts, and percentiles of how old ids were when they came and of the pauses between messages, in ms."""
    ages: list[float] = []
    gaps: list[float] = []
    last: dict[int, float] = {}
    tokens: Counter[int] = Counter()
    text = 0
    for number, now, data in arrivals:
        delta = pb.GenerateResponse.FromString(data).delta
        ages += [1e3 * age(token, now) for token in delta.token_ids]
        tokens[number] += len(delta.token_ids)
        text += len(delta.text)
        if number in last:
            gaps.append(1e3 * (now - last[number]))
        last[number] = now
    ages.sort()
    gaps.sort()
    return {
        "seconds": seconds,
        "deltas": len(arrivals),
        "tokens": tokens.total(),
        "characters": text,
        "least_tokens": min(tokens.values(), default=0),
        "most_tokens": max(tokens.values(), default=0),
        "age_p50": ages[len(ages) // 2],
        "age_p99": ages[len(ages) * 99 // 100],
        "gap_p99": gaps[len(gaps) * 99 // 100],
        "gap_max": gaps[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--stagger", type=float, default=0.02)
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
