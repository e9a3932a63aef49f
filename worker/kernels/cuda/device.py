"""What the backend asks of a GPU besides arithmetic: memory that copies run from beside the CPU, marks in its queue of
work, how much memory there is, and graphs. Tests bring a `Device` that is a CPU.

Nothing here is called before a rank was forked: CUDA, once started in a process, is of no use to its children.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from worker.kernels.cpu.native import NativeError

T = TypeVar("T")

LEAST_CAPABILITY = (8, 0)
"""bfloat16 products came with Ampere."""


class CudaError(NativeError):
    """No GPU, or none that the backend can use; says why."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a GPU."""

    total: int
    free: int
    """That no process has."""
    allocated: int
    """In tensors of this process."""
    peak: int
    """The most that `allocated` has been since `reset_peak`."""
    reserved: int
    """That torch has from the driver: `allocated`, and what it keeps for tensors to come."""


class Mark(Protocol):
    """A place in the GPU's queue of work."""

    def wait(self) -> None:
        """Returns once the GPU has come past it."""
        ...


class Graph(Protocol):
    """Recorded work. It reads and writes the addresses that it was recorded with, whatever lies there by then."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Records work as graphs, which share one pool of memory for what they compute in between, outputs too: a replay
    overwrites the outputs of the one before it."""

    def record(self, run: Callable[[], T]) -> tuple[Graph, T]:
        """The work of `run` and its result, in whose tensors each replay leaves its own. Records, and may not run."""
        ...


class Device(Protocol):
    """One GPU."""

    @property
    def torch(self) -> torch.device: ...

    @property
    def name(self) -> str: ...

    @property
    def capability(self) -> tuple[int, int]: ...

    def pinned(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of host memory that copies to and from the GPU take place beside the CPU's work with."""
        ...

    def mark(self) -> Mark:
        """After all work that was handed to the GPU so far."""
        ...

    def memory(self) -> Memory: ...

    def reset_peak(self) -> None: ...

    def recorder(self) -> Recorder: ...


class CudaDevice:
    """The GPU of this number, of those that this process may see."""

    def __init__(self, index: int) -> None:
        self.torch = torch.device("cuda", index)
        torch.cuda.set_device(self.torch)
        properties = torch.cuda.get_device_properties(self.torch)
        self.name: str = properties.name
        self.capability: tuple[int, int] = (properties.major, properties.minor)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Mark:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _CudaMark(event)

    def memory(self) -> Memory:
        free, total = torch.cuda.mem_get_info(self.torch)
        return Memory(
            total=total,
            free=free,
            allocated=torch.cuda.memory_allocated(self.torch),
            peak=torch.cuda.max_memory_allocated(self.torch),
            reserved=torch.cuda.memory_reserved(self.torch),
        )

    def reset_peak(self) -> None:
        torch.cuda.synchronize(self.torch)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch)

    def recorder(self) -> Recorder:
        return CudaRecorder()


@dataclass(frozen=True, slots=True)
class _CudaMark:
    event: Any

    def wait(self) -> None:
        self.event.synchronize()


class CudaRecorder:
    """Implements `Recorder` by CUDA graphs."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], T]) -> tuple[Graph, T]:
        graph = torch.cuda.CUDAGraph()
        # Other threads' calls, of NCCL's watchdog for one, do not spoil the recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()
        return graph, out


def open_device(index: int, *, deterministic: bool = False) -> CudaDevice:
    """The GPU of a rank. Raises CudaError.

    Args:
        deterministic: whether cuBLAS shall give the same bits in every run; to be asked before CUDA is first used.
    """
    if torch.version.cuda is None:
        raise CudaError(f"torch {torch.__version__} was built without CUDA")
    if deterministic:
        # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not torch.cuda.is_available():
        raise CudaError("torch finds no GPU: no driver, an older one than its CUDA needs, or no device in reach")
    count = torch.cuda.device_count()
    if index >= count:
        raise CudaError(f"rank {index} needs a GPU of its own, and {count} can be seen")
    device = CudaDevice(index)
    if device.capability < LEAST_CAPABILITY:
        major, minor = device.capability
        raise CudaError(f"{device.name} is sm_{major}{minor}; the backend needs sm_80 or newer")
    # Sums of partial products stay in float32, whatever the shape.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return device
