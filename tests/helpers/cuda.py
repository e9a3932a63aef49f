"""The cuda backend on a CPU: a device that is none, kernels in plain torch, graphs that replay what was recorded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from worker.kernels.cuda import CudaKernels
from worker.kernels.cuda.device import Graph, Mark, Memory, Recorder
from worker.kernels.cuda.flash import FlashAttention
from worker.kernels.cuda.plain import PlainOps

T = TypeVar("T")


class AddressChanged(Exception):
    """A graph was replayed whose memory was given back."""


class Done:
    """A mark that the device is past already."""

    def wait(self) -> None:
        pass


@dataclass
class CpuDevice:
    """Implements `Device`. Memory is as given."""

    recorder_of: Callable[[], Recorder]
    capability: tuple[int, int] = (9, 0)
    name: str = "no GPU"
    torch: torch.device = field(default_factory=lambda: torch.device("cpu"))
    told: Memory = field(default_factory=lambda: Memory(2**30, 2**29, 2**28, 2**28, 2**28))

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self) -> Mark:
        return Done()

    def memory(self) -> Memory:
        return self.told

    def reset_peak(self) -> None:
        pass

    def recorder(self) -> Recorder:
        return self.recorder_of()


class Rerun:
    """Implements `Recorder` for kernels that nothing can record: a replay runs the work anew, on the same tensors."""

    def record(self, run: Callable[[], T]) -> tuple[Graph, T]:
        out = run()
        return _Rerun(run, out), out


@dataclass
class _Rerun:
    run: Callable[[], Any]
    out: Any

    def replay(self) -> None:
        made = self.run()
        if isinstance(self.out, Tensor):
            self.out.copy_(made)


class Replay:
    """Implements `Recorder` as a GPU would: what a graph remembers of a tensor is its address.

    Memory from outside must still be there at a replay, or that fails. What is computed within a graph, and its output,
    is filled with NaN before a replay, and when another graph runs. Reading a value on the host can't be recorded.
    """

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []

    def record(self, run: Callable[[], T]) -> tuple[Graph, T]:
        graph = RecordedGraph(self)
        with _Recording(graph):
            out = run()
        self.graphs.append(graph)
        return graph, out


@dataclass
class RecordedGraph:
    """Calls, in order, with tensors at fixed addresses that they don't keep alive."""

    recorder: Replay
    calls: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)
    """Function, its arguments and named ones, and where its results go; None where it writes to its arguments."""
    outside: dict[int, StorageWeakRef] = field(default_factory=dict)
    """By address, memory that was there before."""
    inside: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    """By address, memory of the graph's own."""
    replays: int = 0

    def replay(self) -> None:
        for address, reference in self.outside.items():
            if reference.expired():  # type: ignore[no-untyped-call]
                raise AddressChanged(f"what lay at {address:#x} when the graph was recorded is gone")
        for graph in self.recorder.graphs:
            graph.poison()
        for function, arguments, named, targets in self.calls:
            results = function(*arguments, **named)
            if targets is not None:
                for target, result in zip(tree_flatten(targets)[0], tree_flatten(results)[0], strict=True):
                    target.copy_(result)
        self.replays += 1

    def poison(self) -> None:
        for storage in self.inside.values():
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            whole.fill_(0xFF)  # NaN in every floating-point type, -1 in integers

    def at_address(self, tensor: Tensor) -> Tensor:
        """The same tensor without a hold on its memory."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return tensor
        raw = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        bare = torch.frombuffer(raw, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(bare, tensor.storage_offset(), tensor.shape, tensor.stride())


_READS_HOST = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal")


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _READS_HOST:
            raise RuntimeError(f"{name}: a graph can't be recorded across a value that the host reads")
        graph = self._graph
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        for tensor in given:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in graph.inside:
                graph.outside.setdefault(storage.data_ptr(), _weak(storage))
        results = func(*args, **kwargs)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        made = [leaf for leaf in tree_flatten(results)[0] if isinstance(leaf, Tensor)]
        addresses = {tensor.untyped_storage().data_ptr() for tensor in given}
        is_view = not writes and bool(made) and all(t.untyped_storage().data_ptr() in addresses for t in made)
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in addresses and storage.nbytes():
                graph.inside[storage.data_ptr()] = storage
        if is_view or name.startswith(("empty", "new_empty")):
            return results  # addresses alone
        fixed, named = tree_map_only(Tensor, graph.at_address, (args, kwargs))
        targets = None if writes else tree_map_only(Tensor, graph.at_address, results)
        graph.calls.append((func, fixed, named, targets))
        return results


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def plain_kernels(
    recorder: Callable[[], Recorder] = Replay,
    attention: FlashAttention | None = None,
    *,
    deterministic: bool = False,
    told: Memory | None = None,
) -> CudaKernels:
    """The cuda backend on a CPU, with kernels in plain torch."""
    device = CpuDevice(recorder) if told is None else CpuDevice(recorder, told=told)
    return CudaKernels(device, PlainOps(), attention, deterministic=deterministic)
