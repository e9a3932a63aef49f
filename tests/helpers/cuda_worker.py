"""A worker with the cuda backend on a device that is a CPU: `python -m tests.helpers.cuda_worker serve ...`.

Which flash-attn it finds is up to PYTHONPATH.
"""

from __future__ import annotations

import os
import sys

import worker.kernels.cuda
from tests.helpers.cuda import CpuDevice, Rerun
from worker.__main__ import main

CAPABILITY = "CUDA_WORKER_CAPABILITY"
"""In the environment: what the device says that it is, such as 9.0."""


def open_device(index: int, *, deterministic: bool) -> CpuDevice:
    major, minor = os.environ.get(CAPABILITY, "8.0").split(".")
    return CpuDevice(Rerun, (int(major), int(minor)))


if __name__ == "__main__":
    worker.kernels.cuda.open_device = open_device  # type: ignore[assignment]
    sys.exit(main(prog_name="cuda worker"))
