"""What a long prompt does to streams that decode, and what they do to it.

    python -m benchmarks.stall --model FOLDER [--streams 8] [--prompt 6000] [--clock wall] [--json]

In each round, through the step loop alone: the long prompt by itself; then streams that decode, undisturbed; then the
long prompt beside them. Told are the 99th percentile of the streams' token intervals, disturbed and undisturbed, and
the time to the long prompt's first token, beside the streams and alone. Random ids, greedy, the prefix cache bypassed.

`--clock cpu` counts the process's CPU time instead, shared out over its threads: on a machine at work for others, whose
clock on the wall says more of them, the two ratios are still those of the work.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from worker.engine.engine import Engine, StepReport
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.kernels import QUANTIZED_FORMATS, choose_kernels, pin_threads, usable_cpus
from worker.model import ModelConfig
from worker.runner.runner import TorchRunner

BLOCK_SIZE = 16
STREAM_PROMPT = 128
STREAM_TOKENS = 1500
"""More than come up."""


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds."""

    first_token_alone: float
    first_token_beside: float
    interval_undisturbed: float
    """99th percentile; the median is beside it."""
    median_undisturbed: float
    interval_disturbed: float
    median_disturbed: float
    steps_disturbed: int

    @property
    def stall(self) -> float:
        return self.interval_disturbed / self.interval_undisturbed

    @property
    def delay(self) -> float:
        return self.first_token_beside / self.first_token_alone


def percentile(values: list[float], share: float) -> float:
    """The smallest of the values that is at least as large as `share` of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Loop:
    """An engine, stepped here."""

    def __init__(self, runner: TorchRunner, limits: SchedulerLimits, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._vocab = runner.config.vocab_size
        self._engine = Engine(
            runner,
            limits,
            max_waiting=16,
            clock=clock,
            deliver=_ignore,
            fault=lambda keys: None,
        )
        self._generator = torch.Generator().manual_seed(7)

    def submit(self, key: str, length: int, new: int) -> None:
        ids = torch.randint(3, self._vocab, (length,), generator=self._generator).tolist()
        self._engine.submit(Request(key, ids, max_tokens=new, use_prefix_cache=False))

    def until_first(self, key: str) -> tuple[float, list[float]]:
        """Steps until a request has its first token; returns how long that took, and the steps' seconds."""
        begun = self._clock()
        steps: list[float] = []
        while True:
            start = self._clock()
            report = self._engine.step()
            steps.append(self._clock() - start)
            if report is not None and any(sequence.key == key for sequence in report.sequences):
                return self._clock() - begun, steps

    def steps(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = self._clock()
            self._engine.step()
            seconds.append(self._clock() - start)
        return seconds

    def abort(self, *keys: str) -> None:
        self._engine.abort(keys)
        self._engine.step()


def one_round(loop: Loop, streams: int, prompt: int, undisturbed_steps: int) -> Round:
    loop.submit("alone", prompt, 1)
    alone, _ = loop.until_first("alone")
    names = [f"stream {number}" for number in range(streams)]
    for name in names:
        loop.submit(name, STREAM_PROMPT, STREAM_TOKENS)
    for name in names:
        loop.until_first(name)
    loop.steps(5)
    # Every stream gets a token in every step: a step is an interval of each.
    undisturbed = loop.steps(undisturbed_steps)
    loop.submit("beside", prompt, 1)
    beside, disturbed = loop.until_first("beside")
    undisturbed += loop.steps(undisturbed_steps)
    loop.abort(*names)
    return Round(
        first_token_alone=alone,
        first_token_beside=beside,
        interval_undisturbed=percentile(undisturbed, 0.99),
        median_undisturbed=statistics.median(undisturbed),
        interval_disturbed=percentile(disturbed, 0.99),
        median_disturbed=statistics.median(disturbed),
        steps_disturbed=len(disturbed),
    )


def _ignore(report: StepReport) -> None:
    """The loop reads what `step` returns."""


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder.")
@click.option("--quantize", type=click.Choice(["none", *QUANTIZED_FORMATS]), default="none")
@click.option("--streams", default=8, help="That decode.")
@click.option("--prompt", default=6000, help="Tokens of the long prompt.")
@click.option("--step-target-ms", default=0.0, help="As of the worker.")
@click.option("--max-step-tokens", default=512, help="As of the worker.")
@click.option("--undisturbed-steps", default=40, help="Before and after the long prompt.")
@click.option("--rounds", default=1)
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall")
@click.option("--json", "as_json", is_flag=True)
def main(
    model: Path,
    quantize: str,
    streams: int,
    prompt: int,
    step_target_ms: float,
    max_step_tokens: int,
    undisturbed_steps: int,
    rounds: int,
    clock: str,
    as_json: bool,
) -> None:
    cpus = usable_cpus()
    chosen = choose_kernels("auto", "auto", head_dim=ModelConfig.read(model).head_dim, threads=len(cpus))
    torch.set_num_threads(1 if chosen.kernels.name == "cpu" else len(cpus))
    runner = TorchRunner(
        model,
        num_blocks=2 * (prompt + 1) // BLOCK_SIZE + streams * 110,
        block_size=BLOCK_SIZE,
        quantize=quantize,
        kernels=chosen.kernels,
    )
    pin_threads(chosen.kernels, cpus)
    limits = SchedulerLimits(max_step_tokens, max_running=streams + 1, step_target=step_target_ms / 1000)
    loop = Loop(runner, limits, time.perf_counter if clock == "wall" else lambda: time.process_time() / len(cpus))
    loop.submit("warm-up", 600, 3)
    loop.until_first("warm-up")
    loop.steps(3)
    for _ in range(rounds):
        result = one_round(loop, streams, prompt, undisturbed_steps)
        if as_json:
            print(json.dumps({**asdict(result), "stall": result.stall, "delay": result.delay}), flush=True)
            continue
        print(
            f"token interval p99 {result.interval_undisturbed * 1e3:.0f} ms undisturbed (median "
            f"{result.median_undisturbed * 1e3:.0f}), {result.interval_disturbed * 1e3:.0f} ms beside a prompt of "
            f"{prompt} (median {result.median_disturbed * 1e3:.0f}, {result.steps_disturbed} steps): "
            f"x{result.stall:.2f}\n"
            f"its first token after {result.first_token_alone:.1f} s alone, {result.first_token_beside:.1f} s beside "
            f"{streams} streams: x{result.delay:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
