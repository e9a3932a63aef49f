"""The engine on a GPU: prefill and decode beside the limits of the card, measured in the same run, and beside vLLM
where it is installed. One command for the day that there is a GPU:

    python -m benchmarks.gpu_bench [--model FOLDER] [--case 1,128,64] [--deterministic]

Figures are tok/s of a case BATCH,PROMPT,NEW, as of `python -m worker bench engine`; vLLM runs the same ids in a process
of its own, greedy, its prefill being its time for one new token.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from qwire import hub
from worker.bench import Case, run_case
from worker.kernels.cuda import ATTENTIONS, Attention, CudaError, CudaKernels, CudaOptions, open_kernels
from worker.model import ModelConfig
from worker.runner.cuda import CudaRunner, CudaSettings
from worker.runner.runner import resolve_dtype

CASES = ("1,128,128", "8,128,128", "32,512,128", "256,128,128", "1,2048,32")
STEP_TOKENS = 8192
ROUNDS = 3

VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
given = json.loads(sys.argv[1])
llm = LLM(model=given["model"], dtype=given["dtype"], max_model_len=given["positions"], skip_tokenizer_init=True,
          enable_prefix_caching=False, max_num_seqs=given["batch"])
def seconds(ids, new):
    params = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt} for prompt in ids], params, use_tqdm=False)
    return time.perf_counter() - start
results = []
for case in given["cases"]:
    seconds(case["ids"], 2)
    first, whole = seconds(case["ids"], 1), seconds(case["ids"], case["new"])
    results.append([first, (whole - first) / (case["new"] - 1)])
print("figures " + json.dumps(results))
"""


@dataclass(frozen=True, slots=True)
class CardLimits:
    """What every figure is a share of."""

    read_bytes_per_s: float
    flop_per_s: float
    """Of products in the model's dtype, a multiplication and an addition counting as two."""


@dataclass(frozen=True, slots=True)
class Row:
    """One case: ours, and vLLM's where there is one."""

    case: Case
    prefill_tok_s: float
    decode_tok_s: float
    decode_bandwidth_share: float
    decode_matrix_share: float
    prefill_matrix_share: float
    vllm_prefill_tok_s: float | None = None
    vllm_decode_tok_s: float | None = None


def measure(dtype: torch.dtype) -> CardLimits:
    """Reading 4 GiB, and products of 8,192 rows; the best of several."""

    def best(run: Callable[[], object]) -> float:
        shortest = float("inf")
        for _ in range(8):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            shortest = min(shortest, time.perf_counter() - start)
        return shortest

    data = torch.ones(2**30, dtype=torch.float32, device="cuda")
    reading = best(data.sum)
    size = 8192
    left, right = (torch.randn(size, size, dtype=dtype, device="cuda") for _ in range(2))
    product = best(lambda: left @ right)
    return CardLimits(data.nbytes / reading, 2 * size**3 / product)


def figures(runner: CudaRunner, case: Case, limits: CardLimits) -> Row:
    """The median of several rounds, behind one that warms up."""
    run_case(runner, Case(case.batch, case.prompt, 2), STEP_TOKENS)
    rounds = [run_case(runner, case, STEP_TOKENS) for _ in range(ROUNDS)]
    prefill = statistics.median(sum(before) for before, _ in rounds)
    # A step's end is seen when its ids are there, and the next one has begun by then: what counts is the distance.
    step = statistics.median(seconds for _, decode in rounds for seconds in decode)
    return shares(runner, case, limits, prefill, step)


def shares(runner: CudaRunner, case: Case, limits: CardLimits, prefill: float, step: float) -> Row:
    """A case's figures, from the seconds of its prompts and of a decode step."""
    length = case.prompt + case.new // 2
    read = runner.weight_bytes + case.batch * length * runner.kv_bytes_per_position
    operations = case.batch * runner.operations(length - 1, length, draws=1)
    return Row(
        case,
        prefill_tok_s=case.batch * case.prompt / prefill,
        decode_tok_s=case.batch / step,
        decode_bandwidth_share=read / step / limits.read_bytes_per_s,
        decode_matrix_share=operations / step / limits.flop_per_s,
        prefill_matrix_share=case.batch * runner.operations(0, case.prompt, draws=1) / prefill / limits.flop_per_s,
    )


def beside_vllm(rows: Sequence[Row], model: Path, dtype: str, vocab: int) -> list[Row]:
    """The same rows with vLLM's figures. Raises CalledProcessError where it fails, its own words on stderr."""
    cases = []
    for row in rows:
        generator = torch.Generator().manual_seed(row.case.batch)
        ids = torch.randint(3, vocab, (row.case.batch, row.case.prompt), generator=generator).tolist()
        cases.append({"ids": ids, "new": row.case.new})
    given = {
        "model": str(model),
        "dtype": dtype,
        "positions": max(row.case.prompt + row.case.new for row in rows),
        "batch": max(row.case.batch for row in rows),
        "cases": cases,
    }
    argv = [sys.executable, "-c", VLLM, json.dumps(given)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("figures ")]
    return with_vllm(rows, json.loads(line.removeprefix("figures ")))


def with_vllm(rows: Sequence[Row], seconds: Sequence[tuple[float, float]]) -> list[Row]:
    """Rows with vLLM's seconds for prompts and for a decode step."""
    return [
        Row(
            row.case,
            row.prefill_tok_s,
            row.decode_tok_s,
            row.decode_bandwidth_share,
            row.decode_matrix_share,
            row.prefill_matrix_share,
            row.case.batch * row.case.prompt / first,
            row.case.batch / step,
        )
        for row, (first, step) in zip(rows, seconds, strict=True)
    ]


def table(rows: Sequence[Row]) -> str:
    """One line a case."""
    lines = [f"{'case':>14}{'prefill':>10}{'matrix':>8}{'vLLM':>10}{'decode':>10}{'read':>6}{'matrix':>8}{'vLLM':>10}"]
    for row in rows:
        case = f"{row.case.batch},{row.case.prompt},{row.case.new}"
        lines.append(
            f"{case:>14}{row.prefill_tok_s:>10.0f}{row.prefill_matrix_share:>8.0%}{_told(row.vllm_prefill_tok_s):>10}"
            f"{row.decode_tok_s:>10.0f}{row.decode_bandwidth_share:>6.0%}{row.decode_matrix_share:>8.0%}"
            f"{_told(row.vllm_decode_tok_s):>10}"
        )
    return "\n".join(lines)


def _told(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.0f}"


def open_runner(
    folder: Path, cases: Sequence[Case], attention: Attention, deterministic: bool, quantize: str
) -> tuple[CudaRunner, CudaKernels]:
    """Raises CudaError."""
    config = ModelConfig.read(folder)
    dtype = resolve_dtype(config, "auto")
    options = CudaOptions(
        deterministic=deterministic, attention=attention, dtype=dtype, kv_dtype=dtype, head_dim=config.head_dim
    )
    kernels, why = open_kernels(options)
    print(f"{kernels.isa} ({why}), torch {torch.__version__}")
    settings = CudaSettings(max_step_tokens=STEP_TOKENS, max_running=max(case.batch for case in cases))
    runner = CudaRunner(folder, kernels=kernels, settings=settings, quantize=quantize)
    runner.make_ready()
    return runner, kernels


@click.command()
@click.option("--model", default=hub.DEMO, help="Folder, hub id or demo.")
@click.option("--quantize", default="none", help="As of serve.")
@click.option("--case", "cases", multiple=True, default=CASES, metavar="B,P,N", help="Batch, prompt, new; repeatable.")
@click.option("--attention", type=click.Choice(ATTENTIONS), default="auto", help="As of serve.")
@click.option("--deterministic", is_flag=True, help="As of serve: beside a run without, what the mode costs.")
def main(model: str, quantize: str, cases: Sequence[str], attention: Attention, deterministic: bool) -> None:
    """Time the engine on this machine's first GPU."""
    parsed = [Case.parse(case) for case in cases]
    if not torch.cuda.is_available():
        why = "has no CUDA" if torch.version.cuda is None else "finds no GPU"
        print(f"nothing was measured: torch {torch.__version__} {why}, or CUDA has no driver here", file=sys.stderr)
        sys.exit(2)
    folder = hub.resolve(model, sys.stderr)
    try:
        runner, kernels = open_runner(folder, parsed, attention, deterministic, quantize)
    except CudaError as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        sys.exit(2)
    limits = measure(runner.dtype)
    print(
        f"{folder.name}, {runner.quantization}, {runner.dtype}; limits: "
        f"reading {limits.read_bytes_per_s / 1e9:.0f} GB/s, products {limits.flop_per_s / 1e12:.0f} TFLOP/s"
    )
    rows = [figures(runner, case, limits) for case in parsed]
    if importlib.util.find_spec("vllm") is not None and quantize == "none":
        dtype, vocab = str(runner.dtype).removeprefix("torch."), runner.config.vocab_size
        del runner, kernels
        torch.cuda.empty_cache()
        rows = beside_vllm(rows, folder, dtype, vocab)
    print(table(rows))


if __name__ == "__main__":
    main()
