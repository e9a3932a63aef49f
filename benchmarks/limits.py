"""What this machine can do: the bandwidth and arithmetic that everything else is a share of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Limits:
    """Measured, not looked up."""

    read_bytes_per_s: float
    """Reading memory that no cache holds, with all threads."""
    flop_per_s: float
    """float32 matrix product, with all threads."""


def measure() -> Limits:
    """Takes about a second."""
    data = torch.ones(64 * 1024 * 1024)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    packed = torch.ops.mkldnn._reorder_linear_weight(right, 1024)

    def product() -> None:
        torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")

    return Limits(
        read_bytes_per_s=data.nbytes / median_seconds(lambda: float(data.sum()), 7),
        flop_per_s=2 * 1024**3 / median_seconds(product, 9),
    )


def median_seconds(run: Callable[[], object], times: int) -> float:
    """Median wall time of a call, after one that doesn't count."""
    run()
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
