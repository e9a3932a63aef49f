"""What a step costs besides its kernels: CPU seconds of each step that no compiled kernel runs in, and where they go.

    python -m benchmarks.overhead [--batch 16] [--steps 200] [--temperature 0] [--profile]

The model has the depth and the vocabulary of Qwen3-0.6B and rows so narrow that kernels take next to nothing; what
Python does in a step doesn't depend on how wide they are. Every call into the compiled module is timed and taken off.
All of it is one thread's CPU time, which other processes change little.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.engine import random_ids
from qwire import prefix
from tests.helpers.models import write_random_qwen3
from worker.engine.engine import Engine, StepReport
from worker.engine.plan import SamplingParams
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.kernels import choose_kernels
from worker.kernels.cpu import CpuKernels
from worker.runner.runner import TorchRunner

LAYERS, VOCAB, PROMPT = 28, 151_936, 128


class TimedModule:
    """Stands for the compiled module, and adds up the seconds that are spent in it."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if name == "Program":
            return type("Program", (function,), {"run": self._timed(function.run)})
        timed = self._timed(function) if callable(function) else function
        setattr(self, name, timed)
        return timed

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.thread_time()
            result = function(*arguments)
            self.seconds += time.thread_time() - start
            return result

        return call


def _ignore(report: StepReport) -> None:
    """A benchmark reads what `step` returns."""


@click.command()
@click.option("--batch", default=16, help="Sequences that decode.")
@click.option("--steps", default=200, help="Steps that count.")
@click.option("--temperature", default=0.0, help="0 is greedy.")
@click.option("--profile", is_flag=True, help="Say which functions the time goes to.")
def main(batch: int, steps: int, temperature: float, profile: bool) -> None:
    """Measures steps of `batch` sequences that all decode."""
    native = choose_kernels("cpu").kernels
    assert isinstance(native, CpuKernels)
    timed = TimedModule(native.native)
    kernels = CpuKernels(native.isa, timed)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_qwen3(
            Path(folder), layers=LAYERS, vocab=VOCAB, hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=64
        )
        runner = TorchRunner(path, num_blocks=batch * (PROMPT + steps) // 16 + 2 * batch, kernels=kernels)
    engine = Engine(
        runner,
        SchedulerLimits(max_running=batch),
        max_waiting=batch,
        clock=time.perf_counter,
        deliver=_ignore,
        fault=lambda keys: None,
    )
    root = prefix.root(b"bench", "", runner.block_size, "", b"")
    sampling = SamplingParams(temperature=temperature, top_k=20, top_p=0.95) if temperature else SamplingParams()
    for number, ids in enumerate(random_ids(batch, PROMPT, VOCAB)):
        engine.submit(Request(number, ids, sampling=sampling, max_tokens=steps + 1, prefix_root=root))
    outside: list[float] = []
    inside: list[float] = []
    profiler = cProfile.Profile()
    while True:
        timed.seconds = 0.0
        decodes = len(engine.scheduler.running) == batch
        if profile and decodes:
            profiler.enable()
        start = time.thread_time()
        report = engine.step()
        took = time.thread_time() - start
        profiler.disable()
        if report is None:
            break
        if decodes and len(report.sequences) == batch:
            inside.append(timed.seconds)
            outside.append(took - timed.seconds)
    print(f"batch {batch}, {len(outside)} steps, medians and 90th percentiles:")
    for what, seconds in (("outside kernels", outside), ("within", inside)):
        high = statistics.quantiles(seconds, n=10)[-1]
        print(f"  {what:<16} {statistics.median(seconds) * 1e3:6.2f} ms {high * 1e3:6.2f}")
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
