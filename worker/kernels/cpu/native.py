"""Finds the module of compiled kernels that this machine runs best."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from types import ModuleType

from worker.kernels.names import INSTRUCTION_SETS

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class NativeError(Exception):
    """No compiled kernels, or not those that were asked for; says why."""


def load(isa: str = "auto") -> tuple[str, ModuleType]:
    """The best instruction set that was compiled and that this machine has, or the one named, and its module.

    Raises NativeError.
    """
    try:
        portable = importlib.import_module("worker.kernels.cpu._portable")
    except ImportError as error:
        raise NativeError("the CPU kernels were not compiled at install (it takes a C++ compiler)") from error
    supported = portable.instruction_sets()
    if isa == "auto":
        names = [name for name in INSTRUCTION_SETS if name in supported]
    elif isa in INSTRUCTION_SETS and isa not in supported:
        raise NativeError(f"this machine doesn't have {isa}: it has {', '.join(supported)}")
    else:
        names = [isa]
    for name in names:
        try:
            return name, importlib.import_module(f"worker.kernels.cpu._{name}")
        except ImportError:
            continue
    raise NativeError(f"no CPU kernels were compiled for {' or '.join(names)}")


def usable_cpus() -> list[int]:
    """The CPUs that this process may run on, no more of them than its control group has CPU time for."""
    cpus = sorted(os.sched_getaffinity(0))
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
        return cpus[: max(1, math.ceil(int(quota) / int(period)))]
    except (OSError, ValueError):  # no such file, or "max"
        return cpus
