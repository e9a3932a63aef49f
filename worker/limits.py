"""What this machine can do: the bandwidth and arithmetic that every speed is a share of. Measured, not looked up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from worker.kernels import NativeError
from worker.kernels.cpu import native

PROBE_SECONDS = 0.01
"""Enough to tell a good state of a shared machine from a bad one."""


@dataclass(frozen=True, slots=True)
class Limits:
    """With all threads of this process."""

    read_bytes_per_s: float
    """Reading memory that no cache holds."""
    flop_per_s: float
    """float32, a multiplication and an addition counting as two."""
    int8_op_per_s: float | None
    """Products as int8 weights have them, summed into 32 bits: of bytes, or without VNNI of words. Counted alike; None
    where nothing was compiled that could measure it."""


def measure(seconds: float = 0.3, isa: str = "auto") -> Limits:
    """The best of three turns, since others of a shared machine can only take from it; takes 9 times `seconds`.

    The compiled kernels' threads measure where there are any (`choose_kernels` sets their number), else torch's.
    """
    try:
        _, module = native.load(isa)
    except NativeError:
        return _measure_torch(seconds)
    return Limits(
        read_bytes_per_s=_best(lambda: module.measure_read_bandwidth(seconds)),
        flop_per_s=_best(lambda: module.measure_fma(seconds)),
        int8_op_per_s=_best(lambda: module.measure_int8(seconds)),
    )


def probe() -> Limits:
    """The machine's state now, roughly, in 30 ms."""
    try:
        _, module = native.load()
    except NativeError:
        return _measure_torch(PROBE_SECONDS)
    return Limits(
        module.measure_read_bandwidth(PROBE_SECONDS),
        module.measure_fma(PROBE_SECONDS),
        module.measure_int8(PROBE_SECONDS),
    )


def _best(turn: Callable[[], float]) -> float:
    return max(turn() for _ in range(3))


def _measure_torch(seconds: float) -> Limits:
    data = torch.ones(64 * 1024 * 1024)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return Limits(
        read_bytes_per_s=data.nbytes / _shortest(data.sum, seconds),
        flop_per_s=2 * 1024**3 / _shortest(lambda: left @ right, seconds),
        int8_op_per_s=None,
    )


def _shortest(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call after the first, within `seconds` or three calls."""
    run()
    best, calls, end = float("inf"), 0, time.perf_counter() + seconds
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best
