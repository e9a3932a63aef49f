"""What the service costs: tokens a second of streams over gRPC, with text, beside those of the engine alone.

    python -m benchmarks.service --model FOLDER [--batch 8] [--prompt 128] [--new 128] [--starts 1] [--rounds 8]

Router, tokenizer service, worker and a light client share the machine's cores; an engine in this process, in turn with
them, has them for itself. Both are loaded all the time, so that turns are seconds apart. Of either, the tokens and the
time count while all streams decode. A turn of the service is compared with those of the engine before and after it,
and counts only where these agree: shared machines change their state within seconds. One process may also have faster
memory than another for as long as it lives: several starts show what that makes. Streams are long enough for their
beginning, which a router is busy with in the first step or two, to count for little.
"""

from __future__ import annotations

import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import torch

from benchmarks.stream_client import Load, stream_client
from tests.helpers.stacks import eventually, running_stack
from worker.bench import Case, run_case
from worker.kernels import choose_kernels, pin_threads, usable_cpus
from worker.loading import GATHERED
from worker.runner.runner import TorchRunner

STEP_TOKENS = 512
"""That a step computes at most, on either side."""
SETTLES = 120
"""Seconds that a worker may take until its memory is as an engine's, which moves it before its first turn."""
SAME = 0.08
"""By how much of their mean two turns of the engine may differ, where the machine's state is the same."""


def load(model: Path, case: Case) -> TorchRunner:
    """The engine's, on all cores."""
    cpus = usable_cpus()
    kernels = choose_kernels(threads=len(cpus)).kernels
    runner = TorchRunner(model, num_blocks=case.blocks + 1, dtype="auto", kernels=kernels)
    torch.set_num_threads(1)
    pin_threads(kernels, cpus)
    runner.gather_pages()  # as a worker does once it is up
    return runner


def alone(runner: TorchRunner, case: Case) -> float:
    """The same of the engine alone, in a thread of its own: its cores are fixed."""
    _, decode = run_case(runner, case, STEP_TOKENS)
    return case.batch / statistics.fmean(decode)


def compare(model: Path, case: Case, rounds: int) -> list[float]:
    """Starts both, and has them take turns: what the service has of its engine, in each round that counts."""
    prompts_first = "--step-target-ms", "60000"  # so that all streams decode at once for long
    flags = ("--kv-cache-mib", "1024", "--speculation", "0", "--max-step-tokens", str(STEP_TOKENS), *prompts_first)
    counted: list[float] = []
    with (
        running_stack(model, "model", worker_flags=flags) as stack,
        stream_client(stack.address) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        runner = thread.submit(load, model, case).result()
        if not eventually(lambda: any(GATHERED in line for line in stack.lines), SETTLES):
            raise click.ClickException("the worker doesn't settle")
        vocab = runner.config.vocab_size
        client.rate(Load(case.batch, case.prompt, case.new, vocab, 0))  # records steps, and so on
        before = thread.submit(alone, runner, case).result()
        for done in range(1, 3 * rounds + 1):
            service = client.rate(Load(case.batch, case.prompt, case.new, vocab, done))
            after = thread.submit(alone, runner, case).result()
            engine = (before + after) / 2
            counts = abs(before - after) < SAME * engine
            if counts:
                counted.append(service / engine)
            verdict = f"{service / engine:.3f}" if counts else "not counted"
            print(f"service {service:.1f} tok/s, engine {before:.1f} and {after:.1f}: {verdict}", file=sys.stderr)
            before = after
            if len(counted) == rounds:
                break
    return counted


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--batch", default=8)
@click.option("--prompt", default=128, help="Tokens.")
@click.option("--new", default=128, help="Tokens.")
@click.option("--starts", default=1, help="Of both.")
@click.option("--rounds", default=8, help="That count, of each start.")
def main(model: Path, batch: int, prompt: int, new: int, starts: int, rounds: int) -> None:
    """Compares the service with its engine."""
    counted = [compare(model, Case(batch, prompt, new), rounds) for _ in range(starts)]
    medians = " ".join(f"{statistics.median(ratios):.3f} ({len(ratios)})" for ratios in counted if ratios)
    every = [ratio for ratios in counted for ratio in ratios]
    median = f"{statistics.median(every):.3f} of the engine's" if every else "no two turns of the engine agree"
    print(f"{model.name}, batch {batch}: {median}; by starts, and the rounds that counted: {medians}")


if __name__ == "__main__":
    main()
