"""`python -m worker bench engine`: prefill and decode of the step loop alone, beside what the machine could do.

A case is BATCH,PROMPT,NEW: so many prompts of random ids come in at once, and each gets so many tokens, greedy, without
regard to EOS. Prompts are computed in one step where they fit in `--max-step-tokens`. Decode is the median step with
all sequences and no prompt; prefill is all steps before.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from qwire import prefix
from worker.engine.engine import Engine, StepReport
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.kernels import (
    BACKENDS,
    INSTRUCTION_SETS,
    QUANTIZED_FORMATS,
    NativeError,
    choose_kernels,
    pin_threads,
    usable_cpus,
)
from worker.kernels.cpu import native
from worker.limits import Limits, measure, probe
from worker.model import ModelConfig, ModelError
from worker.runner.runner import TorchRunner

CASES = ("1,128,64", "8,128,64", "16,64,64", "1,512,2", "1,2048,32")
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Case:
    """So many prompts of so many ids, and so many new ids for each."""

    batch: int
    prompt: int
    new: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """From BATCH,PROMPT,NEW; a usage error for anything else."""
        parts = text.split(",")
        if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
            raise click.BadParameter(f"{text!r} is no case such as 8,128,64: batch, prompt tokens, new tokens")
        batch, prompt, new = map(int, parts)
        if new < 2:
            raise click.BadParameter(f"{text!r}: a decode step needs at least 2 new tokens")
        return cls(batch, prompt, new)

    @property
    def blocks(self) -> int:
        return self.batch * -(-(self.prompt + self.new) // BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Result:
    """What a case took. Shares are of the limits that were measured in the same run, before the first case."""

    batch: int
    prompt: int
    new: int
    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float
    """Until every prompt has its first token."""
    decode_step_bytes: int
    """Weights, keys and values that a decode step must read, at the middle of the case."""
    decode_step_ops: int
    prefill_ops: int
    decode_bandwidth_share: float
    decode_arithmetic_share: float
    prefill_arithmetic_share: float
    state_before: Limits
    """The machine's, right before the case; others may be at work on it."""
    state_after: Limits


def run_case(runner: TorchRunner, case: Case, max_step_tokens: int) -> tuple[list[float], list[float]]:
    """Seconds of the steps before all sequences decode, and of those in which they all do and nothing else."""
    engine = Engine(
        runner,
        SchedulerLimits(max_step_tokens, max_running=case.batch, positions_ahead=runner.positions_ahead),
        max_waiting=case.batch,
        clock=time.perf_counter,
        deliver=_ignore,
        fault=lambda keys: None,
    )
    generator = torch.Generator().manual_seed(case.batch)
    ids = torch.randint(3, runner.config.vocab_size, (case.batch, case.prompt), generator=generator).tolist()
    root = prefix.root(b"bench", "", runner.block_size, "", b"")
    for number, prompt in enumerate(ids):
        engine.submit(Request(number, prompt, max_tokens=case.new, prefix_root=root))
    before: list[float] = []
    decode: list[float] = []
    while True:
        start = time.perf_counter()
        report = engine.step()
        seconds = time.perf_counter() - start
        if report is None:
            return before, decode
        if len(report.sequences) == case.batch and all(sequence.token_index for sequence in report.sequences):
            decode.append(seconds)
        elif not decode:
            before.append(seconds)


def bench(runner: TorchRunner, case: Case, limits: Limits, max_step_tokens: int) -> Result:
    """One turn to warm up, one that counts."""
    run_case(runner, Case(case.batch, case.prompt, 2), max_step_tokens)
    state_before = probe()
    prefill, decode = run_case(runner, case, max_step_tokens)
    state_after = probe()
    step = statistics.median(decode)
    length = case.prompt + case.new // 2
    step_bytes = runner.weight_bytes + case.batch * length * runner.kv_bytes_per_position
    step_ops = case.batch * runner.operations(length - 1, length, draws=1)
    prefill_ops = case.batch * runner.operations(0, case.prompt, draws=1)
    peak = _product_limit(limits, runner)
    return Result(
        **asdict(case),
        prefill_tok_s=case.batch * case.prompt / sum(prefill),
        decode_tok_s=case.batch / step,
        ttft_s=sum(prefill),
        decode_step_bytes=step_bytes,
        decode_step_ops=step_ops,
        prefill_ops=prefill_ops,
        decode_bandwidth_share=step_bytes / step / limits.read_bytes_per_s,
        decode_arithmetic_share=step_ops / step / peak,
        prefill_arithmetic_share=prefill_ops / sum(prefill) / peak,
        state_before=state_before,
        state_after=state_after,
    )


def _product_limit(limits: Limits, runner: TorchRunner) -> float:
    """Operations a second that products with these weights can reach: int8 ones are multiplied as bytes or
    words, bfloat16 ones as words or digits, which take one to three times that, where the kernels keep them in fixed
    point. int4's limit is int8's, though its groups of 32 fill half of a tile of AMX, and with AVX2 it is multiplied as
    bytes where int8 is as words."""
    if limits.int8_op_per_s is None:
        return limits.flop_per_s
    if runner.quantization != "none":
        return limits.int8_op_per_s
    if runner.kernels.name != "cpu" or runner.dtype != torch.bfloat16:
        return limits.flop_per_s
    _, module = native.load(runner.kernels.isa)
    return limits.int8_op_per_s / module.fixed_products if module.fixed_point else limits.flop_per_s


def _ignore(report: StepReport) -> None:
    """A benchmark reads what `step` returns."""


@click.group("bench")
def bench_command() -> None:
    """Measure."""


@bench_command.command("engine")
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder.")
@click.option("--quantize", type=click.Choice(["none", *QUANTIZED_FORMATS]), default="none", help="As of serve.")
@click.option("--dtype", default="auto", help="As of serve.")
@click.option("--kv-dtype", default="auto", help="As of serve.")
@click.option("--backend", type=click.Choice(["auto", *BACKENDS]), default="auto", help="As of serve.")
@click.option("--isa", type=click.Choice(["auto", *INSTRUCTION_SETS]), default="auto", help="As of serve.")
@click.option("--threads", type=click.IntRange(0), default=0, help="As of serve.")
@click.option("--case", "cases", multiple=True, default=CASES, metavar="B,P,N", help="Batch, prompt, new; repeatable.")
@click.option("--max-step-tokens", type=click.IntRange(1), default=2048, help="Tokens that one step computes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def engine_command(
    model: Path,
    quantize: str,
    dtype: str,
    kv_dtype: str,
    backend: str,
    isa: str,
    threads: int,
    cases: Sequence[str],
    max_step_tokens: int,
    as_json: bool,
) -> None:
    """Time prefill and decode of the step loop, without router and tokenizer service."""
    parsed = [Case.parse(case) for case in cases]
    cpus = usable_cpus()
    threads = threads or len(cpus)
    started = time.perf_counter()
    try:
        chosen = choose_kernels(backend, isa, head_dim=ModelConfig.read(model).head_dim, threads=threads)
        torch.set_num_threads(threads)
        runner = TorchRunner(
            model,
            num_blocks=max(case.blocks for case in parsed) + 1,
            block_size=BLOCK_SIZE,
            dtype=dtype,
            kv_dtype=kv_dtype,
            quantize=quantize,
            kernels=chosen.kernels,
        )
    except (NativeError, ModelError) as error:
        raise click.ClickException(str(error)) from error
    if chosen.kernels.name == "cpu":
        torch.set_num_threads(1)
    if threads == len(cpus):
        pin_threads(chosen.kernels, cpus)
    load_s = time.perf_counter() - started
    runner.gather_pages()  # as a worker does once it is up
    limits = measure(isa=isa)
    results = [bench(runner, case, limits, max_step_tokens) for case in parsed]
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    told = {
        "model": str(model),
        "quantization": runner.quantization,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "kv_dtype": str(runner.kv_dtype).removeprefix("torch."),
        "backend": runner.kernels.name,
        "isa": runner.kernels.isa,
        "threads": threads,
        "torch": torch.__version__,
        "load_s": load_s,
        "weight_bytes": runner.weight_bytes,
        "peak_rss_bytes": peak_rss,
        "limits": asdict(limits),
    }
    if as_json:
        click.echo(json.dumps({**told, "cases": [asdict(result) for result in results]}))
        return
    click.echo(
        f"{model.name}: {told['quantization']}, {told['dtype']}, KV {told['kv_dtype']}; {told['backend']} "
        f"{told['isa']}, {threads} threads; loaded in {load_s:.1f} s; weights {runner.weight_bytes / 1e6:.0f} MB, "
        f"peak RSS {peak_rss / 1e6:.0f} MB"
    )
    int8 = "" if limits.int8_op_per_s is None else f", int8 {limits.int8_op_per_s / 1e9:.0f} GOP/s"
    click.echo(
        f"limits: reading {limits.read_bytes_per_s / 1e9:.1f} GB/s, float32 {limits.flop_per_s / 1e9:.0f} GFLOP/s{int8}"
    )
    click.echo(
        f"{'case':>12} {'prefill tok/s':>14} {'share':>6} {'TTFT ms':>8} {'decode tok/s':>13} {'bytes':>9}  share"
    )
    for r in results:
        click.echo(
            f"{f'{r.batch},{r.prompt},{r.new}':>12} {r.prefill_tok_s:>14.1f} {r.prefill_arithmetic_share:>6.0%} "
            f"{r.ttft_s * 1e3:>8.0f} {r.decode_tok_s:>13.1f} {r.decode_step_bytes / 1e6:>6.0f} MB  "
            f"{r.decode_bandwidth_share:.0%} of bandwidth, {r.decode_arithmetic_share:.0%} of arithmetic"
        )
