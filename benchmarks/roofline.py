"""What a decode step must take on a GPU, on paper: bytes, operations and the time that neither can beat, by kernel.

`python -m benchmarks.roofline` prints the tables of `docs/performance.md`. A floor is the longer of bytes / bandwidth
and operations / peak; a kernel's bytes are each input read once and each output written once, by all layers of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

BANDWIDTH = 3.35e12
"""Bytes a second and, below, bfloat16 operations a second without sparsity: H100 SXM5 (NVIDIA's data sheet)."""
PEAK = 989e12

CONTEXT = 1024
"""Positions that each sequence has written."""
BATCHES = (1, 32, 256)
_HALF = 2
"""Bytes of bfloat16."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes, as its config.json has them."""

    name: str
    layers: int
    hidden: int
    inner: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


MODELS = (
    Shape("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151936),
    Shape("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """One kernel's share of a step."""

    kernel: str
    bytes: float
    operations: float

    @property
    def seconds(self) -> float:
        """The floor."""
        return max(self.bytes / BANDWIDTH, self.operations / PEAK)


def _linear(rows: int, outer: int, inner: int, bits: float) -> tuple[float, float]:
    return outer * inner * bits / 8 + rows * (outer + inner) * _HALF, 2.0 * rows * outer * inner


def costs(shape: Shape, batch: int, bits: float = 16, kv_bytes: float = _HALF) -> list[Cost]:
    """A decode step of `batch` sequences with `CONTEXT` positions; weights of `bits` a value."""
    heads = shape.q_heads + 2 * shape.kv_heads
    wide, queries = heads * shape.head_dim, shape.q_heads * shape.head_dim
    linears = (
        (wide, shape.hidden),
        (shape.hidden, queries),
        (2 * shape.inner, shape.hidden),
        (shape.hidden, shape.inner),
    )
    products = [_linear(batch, outer, inner, bits) for outer, inner in linears]
    # Unlike other weights, the output layer of an int4 model has 8 bits.
    head = _linear(batch, shape.vocabulary, shape.hidden, max(bits, 8.125) if bits < 16 else bits)
    keys = 2 * batch * CONTEXT * shape.kv_heads * shape.head_dim * kv_bytes
    return [
        Cost("linear layers", shape.layers * sum(p[0] for p in products), shape.layers * sum(p[1] for p in products)),
        Cost("output layer", *head),
        Cost(
            "attention",
            shape.layers * (keys + 2 * batch * queries * _HALF),
            shape.layers * 4.0 * batch * CONTEXT * queries,
        ),
        Cost(
            "residual, RMSNorm",
            (2 * shape.layers + 1) * 4 * batch * shape.hidden * _HALF,
            (2 * shape.layers + 1) * 5.0 * batch * shape.hidden,
        ),
        Cost(
            "head norms, RoPE, cache write",
            shape.layers * batch * (2 * wide * _HALF + 4 * shape.head_dim),
            shape.layers * 9.0 * batch * wide,
        ),
        Cost("SiLU, product", shape.layers * 3 * batch * shape.inner * _HALF, shape.layers * 6.0 * batch * shape.inner),
        Cost("draw, filtered", 2 * batch * shape.vocabulary * 4.0, 150.0 * batch * shape.vocabulary),
    ]


def table(shape: Shape) -> str:
    """A model's table: a row a kernel, for each batch MB, GFLOP and the floor in µs."""
    columns = [costs(shape, batch) for batch in BATCHES]
    lines = [
        f"| {shape.name} | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |",
        "|---|" + "---|" * len(BATCHES),
    ]
    for row in zip(*columns, strict=True):
        cells = (f"{one.bytes / 1e6:.1f} MB, {one.operations / 1e9:.2f} GF, {one.seconds * 1e6:.1f} µs" for one in row)
        lines.append(f"| {row[0].kernel} | " + " | ".join(cells) + " |")
    totals = [sum(one.seconds for one in column) for column in columns]
    cells = (
        f"**{total * 1e3:.2f} ms, {batch / total:,.0f} tok/s**" for batch, total in zip(BATCHES, totals, strict=True)
    )
    lines.append("| **step** | " + " | ".join(cells) + " |")
    for label, bits, kv in (
        ("int8 weights", 8.125, 2),
        ("int4 weights", 4.75, 2),
        ("int4 weights, 8-bit KV", 4.75, 1.03),
    ):
        totals = [sum(one.seconds for one in costs(shape, batch, bits, kv)) for batch in BATCHES]
        cells = (
            f"{total * 1e3:.2f} ms, {batch / total:,.0f} tok/s" for batch, total in zip(BATCHES, totals, strict=True)
        )
        lines.append(f"| step, {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables."""
    print("\n\n".join(table(shape) for shape in MODELS))


if __name__ == "__main__":
    main()
