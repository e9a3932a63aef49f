"""The engine against transformers' `generate`, on the same weights: both sides in turn, medians.

    python -m benchmarks.engine [--model FOLDER] [--dtype float32] [--backend reference] [--rounds 3] [--json]

Prefill is 512 tokens; decode is the median step behind a prompt of 128 tokens. Ids are random; greedy; EOS ignored.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from benchmarks.limits import Limits, measure
from qwire import hub, prefix
from worker.engine.engine import Engine, StepReport
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.kernels import BACKENDS, choose_kernels
from worker.model import ModelConfig
from worker.runner.runner import TorchRunner

PROMPT, NEW, PREFILL = 128, 24, 512
BATCHES = (1, 8)


@dataclass(frozen=True)
class Sample:
    """Tokens a second."""

    case: str
    tok_per_s: float


def random_ids(count: int, length: int, vocab: int) -> list[list[int]]:
    """Prompts that share no prefix."""
    return torch.randint(3, vocab, (count, length), generator=torch.Generator().manual_seed(count)).tolist()


def ours(runner: TorchRunner) -> list[Sample]:
    """The step loop without router or tokenizer."""

    def times(prompts: list[list[int]], new: int) -> list[float]:
        """Seconds of each step."""
        engine = Engine(
            runner,
            SchedulerLimits(max_step_tokens=PREFILL),
            max_waiting=64,
            clock=time.perf_counter,
            deliver=_ignore,
            fault=lambda keys: None,
        )
        root = prefix.root(b"bench", "", runner.block_size, "", b"")
        for number, ids in enumerate(prompts):
            engine.submit(Request(number, ids, max_tokens=new, prefix_root=root))
        seconds: list[float] = []
        while True:
            start = time.perf_counter()
            if engine.step() is None:
                return seconds
            seconds.append(time.perf_counter() - start)

    return _cases(times, runner.config.vocab_size)


def theirs(model: Any) -> list[Sample]:
    """transformers' generate, timed at each token."""

    class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ticks = [time.perf_counter()]

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            self.ticks.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def times(prompts: list[list[int]], new: int) -> list[float]:
        clock, ids = Clock(), torch.tensor(prompts)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                stopping_criteria=[clock],
                pad_token_id=0,
            )
        return [after - before for before, after in zip(clock.ticks, clock.ticks[1:], strict=False)]

    return _cases(times, model.config.vocab_size)


def _cases(times: Callable[[list[list[int]], int], list[float]], vocab: int) -> list[Sample]:
    samples = [Sample("prefill 512", PREFILL / sum(times(random_ids(1, PREFILL, vocab), 1)))]
    for batch in BATCHES:
        steps = times(random_ids(batch, PROMPT, vocab), NEW)[-(NEW - 2) :]  # what is before them is prefill
        samples.append(Sample(f"decode {batch}", batch / statistics.median(steps)))
    return samples


def _ignore(report: StepReport) -> None:
    """A benchmark reads what `step` returns."""


def weight_bytes(folder: Path) -> int:
    """Bytes of weights that a decode step reads."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@click.command()
@click.option("--model", default=hub.DEMO, help="Folder, hub id or demo.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]))
@click.option("--backend", default="auto", type=click.Choice(["auto", *BACKENDS]), help="Kernels, as of serve.")
@click.option("--rounds", default=3, help="Turns that each side gets.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def main(model: str, dtype: str, backend: str, rounds: int, as_json: bool) -> None:
    """Compares prefill and decode with transformers."""
    folder = hub.resolve(model, sys.stderr)
    head_dim = ModelConfig.read(folder).head_dim
    kernels = choose_kernels(backend, head_dim=head_dim, threads=torch.get_num_threads()).kernels
    runner = TorchRunner(folder, num_blocks=256, dtype=dtype, kernels=kernels)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    limits = measure()
    sides: dict[str, dict[str, list[float]]] = {"qwire": {}, "transformers": {}}
    for _ in range(rounds):
        for name, samples in (("qwire", ours(runner)), ("transformers", theirs(peer))):
            for sample in samples:
                sides[name].setdefault(sample.case, []).append(sample.tok_per_s)
    medians = {
        name: {case: statistics.median(values) for case, values in cases.items()} for name, cases in sides.items()
    }
    if as_json:
        print(
            json.dumps(
                {"model": str(folder), "dtype": dtype, "backend": kernels.name, "limits": asdict(limits), **medians}
            )
        )
        return
    print(f"{folder.name}, {dtype}, {kernels.name} kernels, medians of {rounds}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"limits: read {limits.read_bytes_per_s / 1e9:.1f} GB/s, float32 {limits.flop_per_s / 1e9:.0f} GFLOP/s")
    print(f"{'case':<14}{'qwire':>10}{'transformers ' + transformers.__version__:>24}{'ratio':>8}   share of limit")
    size = weight_bytes(folder) * (0.5 if dtype == "bfloat16" and runner.config.dtype == "float32" else 1)
    for case, value in medians["qwire"].items():
        other = medians["transformers"][case]
        print(
            f"{case:<14}{value:>10.1f}{other:>24.1f}{value / other:>8.2f}   {_share(case, value, size, runner, limits)}"
        )


def _share(case: str, tok_per_s: float, size: float, runner: TorchRunner, limits: Limits) -> str:
    if case.startswith("decode"):
        steps = tok_per_s / int(case.split()[1])
        return f"{steps * size / limits.read_bytes_per_s:.0%} of bandwidth"
    flop = 2 * size / 4 * tok_per_s
    return f"{flop / limits.flop_per_s:.0%} of arithmetic"


if __name__ == "__main__":
    main()
