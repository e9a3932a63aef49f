"""What the service costs: tokens a second of streams over gRPC, with text, beside those of the engine alone.

    python -m benchmarks.service --model FOLDER [--batch 8] [--prompt 128] [--new 128] [--rounds 3]

Router, tokenizer service, worker and client share the machine's cores; the engine alone, in turn with
them, has them for itself. Only tokens count that come while all streams decode.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from qwire import AsyncClient
from tests.helpers.stacks import running_stack
from worker.model import ModelConfig


async def streamed(address: str, vocab: int, batch: int, prompt: int, new: int, seed: int) -> float:
    """Tokens a second of `batch` streams while all of them decode."""
    chance = random.Random(seed)
    times: list[list[tuple[float, int]]] = []

    async def stream(client: AsyncClient) -> None:
        ids = [chance.randrange(vocab) for _ in range(prompt)]
        got: list[tuple[float, int]] = []
        times.append(got)
        generation = client.generate(token_ids=ids, max_tokens=new, ignore_eos=True, temperature=0)
        async for delta in generation:
            if delta.token_ids:
                got.append((time.perf_counter(), len(delta.token_ids)))

    async with AsyncClient(address) as client:
        await asyncio.gather(*(stream(client) for _ in range(batch)))
    begin, end = max(got[0][0] for got in times), min(got[-1][0] for got in times)
    return sum(count for got in times for at, count in got if begin < at <= end) / (end - begin)


def alone(model: Path, batch: int, prompt: int, new: int) -> float:
    """The same of the engine."""
    argv = [sys.executable, "-m", "worker", "bench", "engine", "--model", str(model), "--json"]
    done = subprocess.run([*argv, "--case", f"{batch},{prompt},{new}"], stdout=subprocess.PIPE, text=True, check=True)
    told: float = json.loads(done.stdout.splitlines()[-1])["cases"][0]["decode_tok_s"]
    return told


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--batch", default=8)
@click.option("--prompt", default=128, help="Tokens.")
@click.option("--new", default=128, help="Tokens.")
@click.option("--rounds", default=3)
def main(model: Path, batch: int, prompt: int, new: int, rounds: int) -> None:
    """Compares the service with its engine."""
    ratios, vocab = [], ModelConfig.read(model).vocab_size
    for number in range(rounds):
        flags = ("--kv-cache-mib", "1024", "--speculation", "0")
        with running_stack(model, "model", worker_flags=flags) as stack:
            asyncio.run(
                streamed(stack.address, vocab, batch, prompt, 4, 1000 + number)
            )  # steps that are recorded, and so on
            service = asyncio.run(streamed(stack.address, vocab, batch, prompt, new, number))
        engine = alone(model, batch, prompt, new)
        ratios.append(service / engine)
        print(f"service {service:.1f} tok/s, engine {engine:.1f} tok/s: {service / engine:.3f}", file=sys.stderr)
    print(f"{model.name}, batch {batch}: {statistics.median(ratios):.3f} of the engine's, median of {rounds}")


if __name__ == "__main__":
    main()
