"""A rank's collectives. On CPUs, and on GPUs where sums are `ordered`, each gives the same bits however many rows it is
asked for, and in whatever order peers answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from worker.parallel.transport import (
    Collectives,
    Store,
    Transport,
    exchange,
    open_collectives,
    open_store,
    open_transport,
    wait_for_all,
)

MEET_SECONDS = 3600.0
"""How long a rank that has loaded its weights waits for the others; the launcher notices those that died."""

CPU = torch.device("cpu")

_FRAME = 2048
"""Bytes that carry a message, its length first. What a step of a few sequences needs fits; a longer one takes a second
transfer."""
_LENGTH = 8
_LONGEST = 1 << 28


class GroupError(Exception):
    """A rank died, or did not answer in time. The group is of no more use: its processes must end."""


def ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    """(parts[0] + parts[1]) + parts[2] …, element by element.

    Tensors of 16 bits are summed in float32 and rounded once. An element's bits depend on nothing but its own parts:
    ring and tree reductions cut tensors into pieces and start each at another rank, so that a row's bits would follow
    its place in the batch.
    """
    total = parts[0].to(torch.float32)
    for part in parts[1:]:
        total = total + part.to(torch.float32)
    return total.to(parts[0].dtype)


class Group:
    """One rank's place among the `world` processes that share a model.

    A group of one needs no `connect`: its collectives return what they are given. Not thread-safe. Collectives raise
    GroupError, and every rank must call the same ones in the same order with tensors of the same shape and dtype.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in a group of {world}")
        self.rank, self.world = rank, world
        self._others = [(rank + step) % world for step in range(1, world)]
        self._store: Store | None = None
        self._transport: Transport | None = None
        self._collectives: Collectives | None = None
        self._ordered = True

    def connect(self, meeting: Path, *, timeout: float, device: torch.device = CPU, ordered: bool = True) -> None:
        """Meets the other ranks; to be called once this rank is ready to work, however long that took.

        Args:
            meeting: a file that exactly the ranks of this group can open, empty at first.
            timeout: seconds that a collective waits for a peer.
            device: where tensors of sums lie. GPUs are connected by NCCL; messages go by gloo all the same.
            ordered: whether sums on GPUs are in the order of the ranks. NCCL's own are faster.

        Raises GroupError.
        """
        if self.world == 1:
            return
        with _told("meeting the other ranks"):
            self._store = open_store(str(meeting), self.world)
            wait_for_all(self._store, self.rank, self.world, timeout=MEET_SECONDS)
            self._transport = open_transport(self._store, self.rank, self.world, timeout=timeout)
            if device.type == "cuda":
                self._collectives = open_collectives(self._store, self.rank, self.world, timeout=timeout)
                self._ordered = ordered

    def sum(self, x: Tensor) -> Tensor:
        """The `ordered_sum` of all ranks' tensors, by rank, or NCCL's where that was asked for; the same on each. May
        be `x`'s own memory."""
        if self.world == 1:
            return x
        if x.is_cuda:
            if not self._ordered:
                self._on_gpus().allreduce([x]).wait()
                return x
            return ordered_sum(self._all_gathered(x))
        parts = [torch.empty_like(x) if rank != self.rank else x for rank in range(self.world)]
        self._exchange(x, [(peer, parts[peer]) for peer in self._others])
        return ordered_sum(parts)

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """Every rank's tensor, by rank, on rank 0; None on the others."""
        if self.world == 1:
            return [x]
        if x.is_cuda:
            # To all ranks: NCCL has nothing faster for one.
            parts = self._all_gathered(x)
            return None if self.rank else parts
        with _told("gathering"):
            if self.rank:
                self._open().send([x], 0, 0).wait()
                return None
            parts = [x, *(torch.empty_like(x) for _ in self._others)]
            for work in [self._open().recv([parts[peer]], peer, 0) for peer in self._others]:
                work.wait()
        return parts

    def meet(self) -> None:
        """Returns once every rank has come here."""
        if self.world == 1:
            return
        mark = torch.zeros(1, dtype=torch.uint8)
        self._exchange(mark, [(peer, torch.empty_like(mark)) for peer in self._others])

    def send_all(self, message: bytes) -> None:
        """From rank 0: `message` to every other rank, which takes it by `receive`."""
        if len(message) > _LONGEST:
            raise ValueError(f"a message holds at most {_LONGEST} bytes, got {len(message)}")
        data = len(message).to_bytes(_LENGTH, "little") + message
        frame = torch.frombuffer(bytearray(data[:_FRAME].ljust(_FRAME, b"\0")), dtype=torch.uint8)
        self._broadcast(frame)
        if len(data) > _FRAME:
            self._broadcast(torch.frombuffer(bytearray(data[_FRAME:]), dtype=torch.uint8))

    def receive(self) -> bytes:
        """On the other ranks: rank 0's next message. Blocks without using a core."""
        frame = self._take(_FRAME)
        length = int.from_bytes(frame[:_LENGTH], "little")
        if length > _LONGEST:
            raise GroupError(f"rank 0 announced a message of {length} bytes")
        inline = frame[_LENGTH : _LENGTH + length]
        return inline + self._take(length - len(inline)) if len(inline) < length else inline

    def _broadcast(self, data: Tensor) -> None:
        with _told("sending to the other ranks"):
            for work in [self._open().send([data], peer, 0) for peer in self._others]:
                work.wait()

    def _take(self, size: int) -> bytes:
        data = torch.empty(size, dtype=torch.uint8)
        with _told("waiting for rank 0"):
            self._open().recv([data], 0, 0).wait()
        return data.numpy().tobytes()

    def _exchange(self, x: Tensor, received: list[tuple[int, Tensor]]) -> None:
        with _told("exchanging with the other ranks"):
            exchange(self._open(), x, received)

    def _all_gathered(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor on a GPU, by rank."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.world)]
        with _told("gathering"):
            self._on_gpus().allgather([parts], [x]).wait()
        return parts

    def _on_gpus(self) -> Collectives:
        if self._collectives is None:
            raise RuntimeError("the group's GPUs are not connected")
        return self._collectives

    def _open(self) -> Transport:
        if self._transport is None:
            raise RuntimeError("the group is not connected")
        return self._transport


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch.distributed raises, for a timeout as for a lost peer
        # Without the place in gloo's sources and its advice.
        reason = re.sub(r"^\[[^]]*\] ", "", str(error)).partition(". ")[0]
        raise GroupError(f"{what}: {reason}") from error
