"""Which backend computes, and why that one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from worker.kernels.cpu import CpuKernels
from worker.kernels.cpu.native import NativeError, load
from worker.kernels.interface import Kernels
from worker.kernels.names import BACKENDS
from worker.kernels.reference import ReferenceKernels

if TYPE_CHECKING:
    from worker.kernels.cuda import CudaOptions

HEAD_TILE = 16


@dataclass(frozen=True, slots=True)
class ChosenKernels:
    """A backend, and a sentence on why it was taken."""

    kernels: Kernels
    why: str


def choose_kernels(
    backend: str = "auto",
    isa: str = "auto",
    *,
    head_dim: int = HEAD_TILE,
    threads: int = 1,
    cuda: CudaOptions | None = None,
) -> ChosenKernels:
    """The backend named, or for "auto" cuda where torch finds a GPU, else the cpu kernels where they were compiled,
    else the reference.

    Args:
        isa: instruction set of the cpu kernels; "auto" is the best that was compiled and that this machine has.
        head_dim: of the model; the cpu kernels take multiples of `HEAD_TILE`.
        threads: that the cpu kernels compute with, the caller's counted; they are this process's, so the last choice
            counts. The reference's are torch's.
        cuda: what the cuda backend is to be; without, "auto" doesn't take it.

    Raises NativeError where what was named cannot be had.
    """
    missing = ""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected auto, {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "cuda" or (backend == "auto" and isa == "auto" and cuda is not None and torch.cuda.is_available()):
        from worker.kernels.cuda import CudaOptions, open_kernels  # Triton and what else no CPU needs

        kernels, told = open_kernels(cuda or CudaOptions())
        return ChosenKernels(kernels, told)
    if backend != "reference":
        try:
            if head_dim % HEAD_TILE:
                raise NativeError(f"the cpu kernels take heads of multiples of {HEAD_TILE}, the model has {head_dim}")
            name, module = load(isa)
        except NativeError as error:
            if backend == "cpu" or isa != "auto":
                raise
            missing = str(error)
        else:
            module.set_threads(threads, [])
            return ChosenKernels(CpuKernels(name, module), "asked for" if isa == name else "the best of this machine")
    return ChosenKernels(ReferenceKernels(), "asked for" if backend == "reference" else missing)


def pin_threads(kernels: Kernels, cpus: Sequence[int]) -> None:
    """Has the cpu kernels' threads stay on these CPUs, one each, and with them the next thread that calls a kernel."""
    if isinstance(kernels, CpuKernels):
        kernels.native.set_threads(len(cpus), list(cpus))
