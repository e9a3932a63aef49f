"""All linear layers of a Qwen3-0.6B step, one weight format: milliseconds, and the share of this machine's limits.

    python -m benchmarks.linear --format int8 --rows 1,8,16,128,512

Every layer has weights of its own, so that no cache serves them twice. The language model's head runs on all rows up to
16, on the last one beyond: there the rows are a prompt's. A shared machine is fast or slow from second to second: each
sample is taken between two short probes of reading and arithmetic, and counts if both found what the best probe of the
run did.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import click
import torch

from worker.kernels import INSTRUCTION_SETS, quantized
from worker.kernels.cpu import linear, native
from worker.kernels.cpu.linear import Format, PackedLinear, Packer

LAYERS = 28
LAYER = {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)}
HEAD = (151936, 1024)
DECODE_ROWS = 16
"""The head runs on all rows up to here."""


def filled(module: ModuleType, shape: tuple[int, int], format: Format) -> PackedLinear:  # noqa: A002
    """A weight of random values. Its rows repeat: random numbers take long to make."""
    rows = torch.randn(256, shape[1]) * 0.03
    slice_: torch.Tensor | quantized.QuantizedWeight = rows
    if format == "int8" or format == "int4":
        slice_ = quantized.quantize(rows, format)
    packer = Packer(module, *shape, format)
    for first in range(0, shape[0], 256):
        last = min(first + 256, shape[0])
        cut = slice_[: last - first] if isinstance(slice_, torch.Tensor) else slice_.rows(0, last - first)
        packer.put(first, cut)
    return packer.finish()


def step(module: ModuleType, weights: list[PackedLinear], rows: int) -> Callable[[], None]:
    """Runs every product of a step into buffers made before."""
    sizes = {weight.in_features for weight in weights}
    inputs = {size: torch.randn(rows, size) for size in sizes}
    outputs = {weight.out_features: torch.empty(rows, weight.out_features) for weight in weights[:-1]}
    head = weights[-1]
    head_rows = rows if rows <= DECODE_ROWS else 1
    logits, last = torch.empty(head_rows, head.out_features), inputs[head.in_features][-head_rows:]

    def run() -> None:
        for weight in weights[:-1]:
            linear.linear(module, inputs[weight.in_features], weight, outputs[weight.out_features])
        linear.linear(module, last, head, logits)

    return run


def probe(module: ModuleType) -> tuple[float, float]:
    """Bytes and float32 operations a second, right now."""
    return module.measure_read_bandwidth(0.01), module.measure_fma(0.005)


def samples(module: ModuleType, run: Callable[[], None], seconds: float) -> Iterator[tuple[float, float, float]]:
    """Seconds of a call, with the lesser of the probes around it."""
    end = time.perf_counter() + seconds
    before = probe(module)
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        after = probe(module)
        yield took, min(before[0], after[0]), min(before[1], after[1])
        before = after


@click.command()
@click.option("--format", "formats", default="bfloat16,int8,int4", help="float32, bfloat16, float16, int8, int4.")
@click.option("--rows", "row_counts", default="1,8,16,128,512")
@click.option("--isa", default="auto", help=f"One of {', '.join(INSTRUCTION_SETS)}.")
@click.option("--threads", default=0, help="0: all that this process may use.")
@click.option("--seconds", default=4.0, help="For each number of rows.")
def main(formats: str, row_counts: str, isa: str, threads: int, seconds: float) -> None:
    """Times linear layers."""
    name, module = native.load(isa)
    cpus = native.usable_cpus()[: threads or None]
    module.set_threads(len(cpus), cpus)
    module.measure_fma(0.2)
    rows_of = [int(rows) for rows in row_counts.split(",")]
    runs: list[tuple[str, int, int, list[tuple[float, float, float]]]] = []
    int8_limit = 0.0
    for format in formats.split(","):  # noqa: A001
        weights = [filled(module, shape, format) for _ in range(LAYERS) for shape in LAYER.values()]  # type: ignore[arg-type]
        weights.append(filled(module, HEAD, format))  # type: ignore[arg-type]
        for rows in rows_of:
            run = step(module, weights, rows)
            run()
            runs.append((format, rows, sum(weight.nbytes for weight in weights), list(samples(module, run, seconds))))
            int8_limit = max(int8_limit, module.measure_int8(0.02))
    read_limit = max(read for *_, taken in runs for _, read, _ in taken)
    fma_limit = max(fma for *_, taken in runs for _, _, fma in taken)
    print(
        f"{name}, {len(cpus)} threads; best of the run: read {read_limit / 1e9:.1f} GB/s, "
        f"float32 {fma_limit / 1e9:.0f} GFLOP/s, int8 {int8_limit / 1e9:.0f} GOP/s"
    )
    print(f"{'format':<10}{'rows':>5}{'ms':>9}{'GB/s':>7}{'GOP/s':>8}{'share':>7}   samples in the good state")
    layers = LAYERS * sum(out * size for out, size in LAYER.values())
    for format, rows, nbytes, taken in runs:  # noqa: A001
        good = [took for took, read, fma in taken if read > 0.85 * read_limit and fma > 0.9 * fma_limit]
        took = statistics.median(good) if good else min(took for took, _, _ in taken)
        operations = 2 * (layers * rows + HEAD[0] * HEAD[1] * (rows if rows <= DECODE_ROWS else 1))
        limit = int8_limit if format.startswith("int") else fma_limit
        share = max(nbytes / read_limit, operations / limit) / took
        print(
            f"{format:<10}{rows:>5}{took * 1e3:>9.1f}{nbytes / took / 1e9:>7.1f}{operations / took / 1e9:>8.0f}"
            f"{share:>7.0%}   {len(good)} of {len(taken)}" + ("" if good else ", so the least of all")
        )


if __name__ == "__main__":
    main()
