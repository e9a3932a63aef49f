"""Whether the cuda backend computes on a GPU what it should: each kernel against the reference on the CPU, and a small
model's tokens. One command for the day that there is a GPU:

    python -m benchmarks.gpu_check [--attention auto] [--dtype bfloat16]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from tests.helpers.kernels import pack
from tests.helpers.models import write_random_qwen3
from tests.helpers.steps import chunk, logits_of, plan, table
from worker.engine.plan import Draw, SamplingParams
from worker.kernels import KVCache, RaggedBatch, ReferenceKernels, SamplingBatch
from worker.kernels.cuda import ATTENTIONS, Attention, CudaError, CudaKernels, CudaOptions, open_kernels
from worker.kernels.quantized import Format
from worker.runner import TorchRunner
from worker.runner.cuda import CudaRunner, CudaSettings

NEAR = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative errors that rounding explains."""
QUERY_HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


@dataclass(frozen=True, slots=True)
class Finding:
    """One check."""

    name: str
    error: float
    allowed: float

    @property
    def good(self) -> bool:
        return self.error <= self.allowed  # NaN is not


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, by the norm of what was expected."""
    wide = expected.double()
    return float((got.cpu().double() - wide).norm() / wide.norm().clamp_min(1e-9))


def check_kernels(kernels: CudaKernels, dtype: torch.dtype) -> Iterator[Finding]:
    """Every kernel of a step, on random numbers."""
    oracle, device, near = ReferenceKernels(), kernels.device, NEAR[dtype]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(kind)

    weight, x = random(256, 512) * 0.05, random(40, 512)
    formats: tuple[Format | None, ...] = (None, "int8", "int4")
    for format_ in formats:
        prepared = [pack(k, weight, None, format_, looked_up=True) for k in (kernels, oracle)]
        got = kernels.linear(x.to(device), prepared[0])
        yield Finding(f"linear {format_ or 'dense'}", relative(got, oracle.linear(x, prepared[1])), near)
        ids = torch.arange(40) * 5
        found = kernels.embed(ids.to(device), prepared[0])
        yield Finding(f"embed {format_ or 'dense'}", relative(found, oracle.embed(ids, prepared[1])), near)
    norm, residual = random(512), random(40, 512)
    normed, total = kernels.rms_norm(x.to(device), norm.to(device), 1e-6, residual.clone().to(device))
    wanted = oracle.rms_norm(x, norm, 1e-6, residual)
    yield Finding("rms_norm", max(relative(normed, wanted[0]), relative(total, wanted[1])), near)
    gate_up = random(40, 2 * 512)
    yield Finding("silu_mul", relative(kernels.silu_mul(gate_up.to(device)), oracle.silu_mul(gate_up)), near)
    yield from _check_attention(kernels, dtype, random)
    yield from _check_draws(kernels, random)


def _check_attention(kernels: CudaKernels, dtype: torch.dtype, random: Callable[..., Tensor]) -> Iterator[Finding]:
    oracle, device, size = ReferenceKernels(), kernels.device, kernels.default_block_size
    shape = (KV_HEADS, 12, size, HEAD_DIM)
    for name, starts, lengths in (("decode", [5, 2 * size, 0], [1, 1, 1]), ("mixed", [5, 0, size + 3], [1, 37, 20])):
        ends = np.array(starts) + np.array(lengths)
        tables = [np.array([11 - 4 * i, 10 - 4 * i, 9 - 4 * i])[: -(-int(end) // size)] for i, end in enumerate(ends)]
        batch = RaggedBatch(np.array(starts), np.array(lengths), tables, shape[1], size)
        rows = sum(lengths)
        qkv = random(rows, (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM)
        cos, sin = random(rows, HEAD_DIM // 2, kind=torch.float32), random(rows, HEAD_DIM // 2, kind=torch.float32)
        positions = [at for start, count in zip(starts, lengths, strict=True) for at in range(start, start + count)]
        owners = [i for i, count in enumerate(lengths) for _ in range(count)]
        slots = torch.tensor(
            [tables[i][at // size] * size + at % size for i, at in zip(owners, positions, strict=True)]
        )
        norms = random(HEAD_DIM), random(HEAD_DIM)
        host = KVCache(random(*shape), random(*shape))
        there = KVCache(host.keys.to(device), host.values.to(device))
        expected = oracle.rope_and_cache(qkv, cos, sin, host, slots, *norms, 1e-6)
        q_norm, k_norm = (norm.to(device) for norm in norms)
        got = kernels.rope_and_cache(
            qkv.to(device), cos.to(device), sin.to(device), there, slots.to(device), q_norm, k_norm, 1e-6
        )
        worst = max(relative(got, expected), relative(there.keys, host.keys), relative(there.values, host.values))
        yield Finding(f"rope_and_cache, {name}", worst, NEAR[dtype])
        for window in (None, 9):
            wanted = oracle.paged_attention(expected, host, oracle.plan_attention(batch, KV_HEADS, [window]), window)
            attended = kernels.paged_attention(got, there, kernels.plan_attention(batch, KV_HEADS, [window]), window)
            yield Finding(
                f"attention, {name}{'' if window is None else ', window'}", relative(attended, wanted), NEAR[dtype]
            )


def _check_draws(kernels: CudaKernels, random: Callable[..., Tensor]) -> Iterator[Finding]:
    rows = 24
    logits = random(rows, 5000, kind=torch.float32) * 3
    number = np.arange(rows)
    batch = SamplingBatch(
        temperature=np.where(number % 4, 0.7 + 0.1 * (number % 3), 0).astype(np.float32),
        top_k=np.where(number % 3, 0, 40).astype(np.int64),
        top_p=np.where(number % 2, 0.9, 1.0),
        min_p=np.where(number % 5, 0.0, 0.05),
        seed=(number * 7919).astype(np.uint64),
        choice=(number % 3).astype(np.int64),
        position=number.astype(np.int64),
    )
    expected = ReferenceKernels().sample(logits.clone(), batch)
    got = kernels.sample(logits.to(kernels.device), batch).cpu()
    yield Finding("sample: ids that differ", float((got != expected).sum()), 0.0)


def check_model(kernels: CudaKernels, dtype: torch.dtype, length: int = 200) -> Iterator[Finding]:
    """A small model's logits and tokens over a prompt of `length`: chunks, decodes by graphs and without."""
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_random_qwen3(Path(scratch), heads=8, kv_heads=2, head_dim=64, hidden=256, dtype=name)
        oracle = TorchRunner(folder, num_blocks=64, kernels=ReferenceKernels())
        runners = []
        for graphs in (True, False):
            settings = CudaSettings(max_step_tokens=256, max_running=4, graphs=graphs)
            runners.append(CudaRunner(folder, kernels=kernels, settings=settings, num_blocks=24))
            runners[-1].make_ready()
        ids = [(7 * i) % 512 for i in range(length)]
        size = runners[0].block_size
        expected = logits_of(oracle, ids, table(0, length, 16), [length])
        got = logits_of(runners[0], ids, table(0, length, size), [length * 3 // 5, 1])
        yield Finding("model: logits, a chunk and decodes", relative(got, expected), 3 * NEAR[dtype])
        tokens = [_greedy(runner, ids, table(0, length + 24, size), 24) for runner in runners]
        differing = sum(a != b for a, b in zip(*tokens, strict=True))
        yield Finding("model: tokens by graphs and without, that differ", float(differing), 0.0)
        if kernels.batch_invariant:
            whole = logits_of(runners[0], ids, table(0, length, size), [length])
            yield Finding("model: bits that follow the batch", float((whole != got).sum()), 0.0)


def _greedy(runner: CudaRunner, prompt: list[int], blocks: tuple[int, ...], count: int) -> list[int]:
    made: list[int] = []
    ids, start = prompt, 0
    for position in range(count):
        ((drawn,),) = runner.execute(plan(chunk(ids, start, blocks, Draw(SamplingParams(), 0, position))))
        start, ids = start + len(ids), [drawn.token_id]
        made.append(drawn.token_id)
    return made


def report(findings: list[Finding]) -> str:
    """A table, and what is wrong last."""
    lines = [f"{'check':<52}{'error':>12}{'allowed':>12}"]
    lines += [
        f"{f.name:<52}{f.error:>12.2g}{f.allowed:>12.2g}{'' if f.good else '   WRONG'}"
        for f in sorted(findings, key=lambda f: not f.good)
    ]
    wrong = sum(not f.good for f in findings)
    return "\n".join([*lines, f"{len(findings) - wrong} good, {wrong} wrong"])


@click.command()
@click.option("--attention", type=click.Choice(ATTENTIONS), default="auto", help="As of serve.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", help="Of weights.")
@click.option("--deterministic", is_flag=True, help="As of serve.")
def main(attention: Attention, dtype: str, deterministic: bool) -> None:
    """Check the cuda backend on this machine's first GPU."""
    kind: torch.dtype = getattr(torch, dtype)
    options = CudaOptions(
        attention=attention, dtype=kind, kv_dtype=kind, head_dim=HEAD_DIM, deterministic=deterministic
    )
    try:
        kernels, why = open_kernels(options)
    except CudaError as error:
        print(f"nothing was checked: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{kernels.isa} ({why}), torch {torch.__version__}")
    with torch.inference_mode():
        findings = [*check_kernels(kernels, kind), *check_model(kernels, kind)]
    print(report(findings))
    sys.exit(any(not finding.good for finding in findings))


if __name__ == "__main__":
    main()
