"""How the ranks of a group reach each other: torch.distributed's backends, of which gloo (CPUs) is run today.

Process groups are built directly, not by `init_process_group`: no global state, no environment variables, and gloo gets
a device that listens on the loopback interface alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, Protocol

from torch import Tensor

Backend = Literal["gloo"]
"""What carries tensors. NCCL comes with the GPU kernels, behind the same `Transport`."""


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


def open_transport(backend: Backend, store: Any, rank: int, world: int, *, timeout: float) -> Transport:
    """Connects this rank with all others, which do the same at the same time.

    `timeout` is in seconds, for connecting and for each later transfer. Raises RuntimeError where it runs out.
    """
    if backend != "gloo":
        raise ValueError(f"backend: expected gloo, got {backend!r}")
    from torch._C import _distributed_c10d as c10d

    gloo: Any = c10d.ProcessGroupGloo  # torch's stubs have other names for its options
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._threads = 1
    options._timeout = timedelta(seconds=timeout)
    group: Transport = gloo(store, rank, world, options)
    return group


def exchange(transport: Transport, sent: Tensor, received: Sequence[tuple[int, Tensor]]) -> None:
    """Sends `sent` to the ranks named in `received`, and receives from each into its tensor; all contiguous."""
    # Every send starts before the first receive: ranks that did it the other way round would still not deadlock, but
    # each transfer would wait for its peer's turn.
    works = [transport.send([sent], peer, 0) for peer, _ in received]
    works += [transport.recv([target], peer, 0) for peer, target in received]
    for work in works:
        work.wait()
