"""How the ranks of a group reach each other: torch.distributed's backends, gloo for CPUs and NCCL between GPUs. NCCL
was never run: no machine that this was written on had a GPU.

Process groups are built directly, not by `init_process_group`: no global state, no environment variables, and gloo gets
a device that listens on the loopback interface alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

from torch import Tensor


class Store(Protocol):
    """Keys and values that the ranks share while they find each other."""

    def set(self, key: str, value: str) -> None: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> bool: ...


class Transport(Protocol):
    """Transfers between two ranks. `wait` raises RuntimeError when the peer is gone or time runs out."""

    def send(self, tensors: list[Tensor], dstRank: int, tag: int) -> Work: ...  # noqa: N803 - torch's names

    def recv(self, tensors: list[Tensor], srcRank: int, tag: int) -> Work: ...  # noqa: N803


class Collectives(Protocol):
    """What GPUs do together. Each is handed to the GPU in the order of the calls; `wait` has what comes after it there
    wait, not the CPU, and so they can be recorded in graphs."""

    def allreduce(self, tensors: list[Tensor]) -> Work:
        """Sums over the ranks, in place, in an order of NCCL's choice."""
        ...

    def allgather(self, output_tensors: list[list[Tensor]], input_tensors: list[Tensor]) -> Work: ...

    def send(self, tensors: list[Tensor], dstRank: int, tag: int) -> Work: ...  # noqa: N803 - torch's names

    def recv(self, tensors: list[Tensor], srcRank: int, tag: int) -> Work: ...  # noqa: N803


def open_store(meeting: str, world: int) -> Store:
    """Where ranks leave each other their ports: the file `meeting`, the group's own. To be kept as long as the group:
    the last rank to drop its store removes the file."""
    from torch._C import _distributed_c10d as c10d  # absent from builds of torch without torch.distributed

    store: Store = c10d.FileStore(meeting, world)
    return store


def wait_for_all(store: Store, rank: int, world: int, *, timeout: float) -> None:
    """Returns once every rank of the group has called this. Raises RuntimeError after `timeout` seconds."""
    store.set(f"here/{rank}", "1")
    store.wait([f"here/{peer}" for peer in range(world)], timedelta(seconds=timeout))


def open_transport(store: Any, rank: int, world: int, *, timeout: float) -> Transport:
    """Connects this rank with all others by gloo, which do the same at the same time.

    `timeout` is in seconds, for connecting and for each later transfer. Raises RuntimeError where it runs out.
    """
    from torch._C import _distributed_c10d as c10d

    gloo: Any = c10d.ProcessGroupGloo  # torch's stubs have other names for its options
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._threads = 1
    options._timeout = timedelta(seconds=timeout)
    group: Transport = gloo(store, rank, world, options)
    return group


def open_collectives(store: Any, name: str, rank: int, world: int, *, timeout: float) -> Collectives:
    """Connects this rank's GPU with the `world` of those who call this with the same name, at the same time; each has
    set its own as torch's current one. Raises RuntimeError.

    A rank that dies leaves its peers' GPUs waiting: `timeout` seconds later NCCL's watchdog ends their processes,
    unless the launcher, which sees the death at once, has done so.
    """
    from torch._C import _distributed_c10d as c10d

    nccl: Any = getattr(c10d, "ProcessGroupNCCL", None)
    if nccl is None:
        raise RuntimeError("this build of torch has no NCCL")
    options = nccl.Options()
    options._timeout = timedelta(seconds=timeout)
    group: Collectives = nccl(c10d.PrefixStore(f"nccl/{name}", store), rank, world, options)
    return group


def exchange(transport: Transport, sent: Tensor, received: Sequence[tuple[int, Tensor]]) -> None:
    """Sends `sent` to the ranks named in `received`, and receives from each into its tensor; all contiguous."""
    # Every send starts before the first receive: ranks that did it the other way round would still not deadlock, but
    # each transfer would wait for its peer's turn.
    works = [transport.send([sent], peer, 0) for peer, _ in received]
    works += [transport.recv([target], peer, 0) for peer, target in received]
    for work in works:
        work.wait()
