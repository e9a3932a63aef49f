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
    Work,
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
    """One process's place among the `size` that share a model: its layers are cut into `stages`, one behind the other,
    and the weights of each stage are shared out over `world` ranks.

    Process 0 gives the orders. It is in the last stage, where logits come to be and tokens are drawn.

    A group of one needs no `connect`: its collectives return what they are given. Not thread-safe. Collectives raise
    GroupError. Every rank of a stage must call the same ones in the same order with tensors of the same shape and
    dtype, and stages must hand on what the next one takes over.

    Args:
        index: of this process, from 0 to `world * stages - 1`.
        world: ranks of a stage.
    """

    def __init__(self, index: int = 0, world: int = 1, stages: int = 1) -> None:
        if not 0 <= index < world * stages:
            raise ValueError(f"rank {index} is not in a group of {world * stages}")
        self.index, self.size = index, world * stages
        self.rank, self.world = index % world, world
        """Of this process within its stage."""
        self.stage, self.stages = stages - 1 - index // world, stages
        self._others = [(index + step) % self.size for step in range(1, self.size)]
        self._first_peer = index - self.rank
        """The process that has rank 0 in this stage."""
        self._store: Store | None = None
        self._transport: Transport | None = None
        self._collectives: Collectives | None = None
        """Of this stage's GPUs."""
        self._pipeline: Collectives | None = None
        """Of the GPUs of all stages."""
        self._handed_on: list[tuple[Work, Tensor]] = []
        """Transfers under way, with the memory that they read."""
        self._ordered = True

    @property
    def first_stage(self) -> bool:
        """Whether ids are embedded here."""
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        """Whether logits come to be here."""
        return self.stage == self.stages - 1

    def connect(self, meeting: Path, *, timeout: float, device: torch.device = CPU, ordered: bool = True) -> None:
        """Meets the other ranks; to be called once this rank is ready to work, however long that took.

        Args:
            meeting: a file that exactly the ranks of this group can open, empty at first.
            timeout: seconds that a collective waits for a peer.
            device: where tensors of sums lie. GPUs are connected by NCCL; messages go by gloo all the same.
            ordered: whether sums on GPUs are in the order of the ranks. NCCL's own are faster.

        Raises GroupError.
        """
        if self.size == 1:
            return
        with _told("meeting the other ranks"):
            self._store = open_store(str(meeting), self.size)
            wait_for_all(self._store, self.index, self.size, timeout=MEET_SECONDS)
            self._transport = open_transport(self._store, self.index, self.size, timeout=timeout)
            if device.type != "cuda":
                return
            self._ordered = ordered
            if self.world > 1:
                stage = f"stage {self.stage}"
                self._collectives = open_collectives(self._store, stage, self.rank, self.world, timeout=timeout)
            if self.stages > 1:
                self._pipeline = open_collectives(self._store, "pipeline", self.index, self.size, timeout=timeout)

    def sum(self, x: Tensor) -> Tensor:
        """The `ordered_sum` of the tensors of the stage's ranks, by rank, or NCCL's where that was asked for; the same
        on each. May be `x`'s own memory."""
        if self.world == 1:
            return x
        if x.is_cuda:
            if not self._ordered:
                self._on_gpus().allreduce([x]).wait()
                return x
            return ordered_sum(self._all_gathered(x))
        parts = [torch.empty_like(x) if rank != self.rank else x for rank in range(self.world)]
        self._exchange(x, [(self._first_peer + rank, parts[rank]) for rank in self._other_ranks()])
        return ordered_sum(parts)

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """The tensors of the stage's ranks, by rank, on its rank 0; None on the others."""
        if self.world == 1:
            return [x]
        if x.is_cuda:
            # To all ranks: NCCL has nothing faster for one.
            parts = self._all_gathered(x)
            return None if self.rank else parts
        with _told("gathering"):
            if self.rank:
                self._open().send([x], self._first_peer, 0).wait()
                return None
            parts = [x, *(torch.empty_like(x) for _ in self._other_ranks())]
            for work in [self._open().recv([parts[rank]], self._first_peer + rank, 0) for rank in self._other_ranks()]:
                work.wait()
        return parts

    def hand_on(self, x: Tensor) -> None:
        """Begins to send `x`, which nobody may write to any more, to the same rank of the next stage."""
        with _told("handing on to the next stage"):
            self._handed_on.append((self._between_stages(x).send([x], self.index - self.world, 0), x))

    def take_over(self, x: Tensor) -> Tensor:
        """`x`, filled with what the same rank of the stage before has handed on."""
        with _told("waiting for the stage before"):
            self._between_stages(x).recv([x], self.index + self.world, 0).wait()
        return x

    def settle(self) -> None:
        """Returns once the next stage has all that was handed on."""
        with _told("handing on to the next stage"):
            for work, _ in self._handed_on:
                work.wait()
        self._handed_on.clear()

    def least(self, value: int) -> int:
        """The least of all processes' values."""
        if self.size == 1:
            return value
        mine = torch.tensor([value])
        told = [(peer, torch.empty_like(mine)) for peer in self._others]
        self._exchange(mine, told)
        return min(value, *(int(theirs) for _, theirs in told))

    def meet(self) -> None:
        """Returns once every process has come here."""
        self.least(0)

    def send_all(self, message: bytes) -> None:
        """From process 0: `message` to every other one, which takes it by `receive`."""
        if len(message) > _LONGEST:
            raise ValueError(f"a message holds at most {_LONGEST} bytes, got {len(message)}")
        data = len(message).to_bytes(_LENGTH, "little") + message
        frame = torch.frombuffer(bytearray(data[:_FRAME].ljust(_FRAME, b"\0")), dtype=torch.uint8)
        self._broadcast(frame)
        if len(data) > _FRAME:
            self._broadcast(torch.frombuffer(bytearray(data[_FRAME:]), dtype=torch.uint8))

    def receive(self) -> bytes:
        """On the others: process 0's next message. Blocks without using a core."""
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

    def _other_ranks(self) -> list[int]:
        return [rank for rank in range(self.world) if rank != self.rank]

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

    def _between_stages(self, x: Tensor) -> Transport | Collectives:
        """What carries `x` from stage to stage."""
        if not x.is_cuda:
            return self._open()
        if self._pipeline is None:
            raise RuntimeError("the stages' GPUs are not connected")
        return self._pipeline

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
