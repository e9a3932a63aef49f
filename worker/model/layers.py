"""The layers that hold weights. Each says what it wants from a checkpoint (`parts`) and takes it over (`take`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.kernels import Kernels, PreparedLinear
from worker.model.module import Module
from worker.model.plan import Shard
from worker.parallel import Group

Take = Callable[[str, int, int], Tensor]
"""Memory for a named result of so many rows and columns; see `worker.model.qwen.Buffers`."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stored weight of a layer, whole, as a checkpoint holds it."""

    shape: tuple[int, ...]
    units: int
    """Equal units that ranks share out along the split dimension: heads, features or ids."""
    bias: bool = False


class Layer(Module):
    """A layer with weights."""

    parts: tuple[Part, ...]
    """Stacked in this order along the first dimension; `worker.model.plan.MERGED` names them if there are several."""


class Matrix(Layer):
    """A layer whose weight the backend keeps in a layout of its own."""

    prepared: PreparedLinear = None

    @property
    def multiplied(self) -> bool:
        """Whether the weight is used in products."""
        return True

    @property
    def looked_up(self) -> bool:
        """Whether single rows of the weight are looked up."""
        return False


class Linear(Matrix):
    """x @ weight.T + bias, over one stored weight or several merged ones."""

    gated = False
    """Whether rows are given as gate and up side by side, and silu(gate) * up is multiplied."""

    def __init__(self, kernels: Kernels, *parts: Part) -> None:
        self.kernels, self.parts = kernels, parts

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self.kernels.linear(x, self.prepared, out)


class RowLinear(Linear):
    """A linear layer whose ranks each hold some of the input features; their products are summed over the group."""

    def __init__(self, kernels: Kernels, group: Group, part: Part, gated: bool = False) -> None:
        super().__init__(kernels, part)
        self.group, self.gated = group, gated

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        multiply = self.kernels.gated_linear if self.gated else self.kernels.linear
        return self.group.sum(multiply(x, self.prepared, out))


class RMSNorm(Layer):
    """Root mean square norm, fused with the residual sum before it."""

    weight: Tensor
    """Of the activations' dtype."""

    def __init__(self, kernels: Kernels, size: int, eps: float) -> None:
        self.kernels, self.eps = kernels, eps
        self.parts = (Part((size,), 1),)

    def __call__(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.kernels.rms_norm(x, self.weight, self.eps, residual, out)


class Embedding(Matrix):
    """A table looked up by id. Each rank holds some of its rows and gives zeros for the ids of others.

    Args:
        tied: whether the table is the output layer's weight as well; they share one copy where the backend can.
    """

    def __init__(self, kernels: Kernels, group: Group, vocab_size: int, hidden_size: int, tied: bool) -> None:
        self.kernels, self.group, self.tied = kernels, group, tied
        self.vocab_size = vocab_size
        self.parts = (Part((vocab_size, hidden_size), vocab_size),)

    @property
    def multiplied(self) -> bool:
        return self.tied

    @property
    def looked_up(self) -> bool:
        return True

    def __call__(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        if self.group.world == 1:
            return self.kernels.embed(ids, self.prepared, out)
        rows = Shard(self.group.rank, self.group.world).rows(self.vocab_size)
        own = ids - self.group.rank * rows
        foreign = (own < 0) | (own >= rows)
        found = self.kernels.embed(own.clamp(0, rows - 1), self.prepared).masked_fill_(foreign[:, None], 0.0)
        return self.group.sum(found)


class Head(Linear):
    """The projection to logits. Each rank computes those of its share of the ids; rank 0 gets all."""

    def __init__(self, kernels: Kernels, group: Group, vocab_size: int, hidden_size: int) -> None:
        super().__init__(kernels, Part((vocab_size, hidden_size), vocab_size))
        self.group, self.vocab_size = group, vocab_size

    def logits(self, hidden: Tensor, take: Take | None = None) -> Tensor | None:
        """float32 [rows, V], on rank 0; None on the others.

        Args:
            take: gives memory for them. Fresh memory of that size costs a page fault for each 4 kB.
        """
        rows = Shard(self.group.rank, self.group.world).rows(self.vocab_size)
        parts = self.group.gather(self(hidden, None if take is None else take("logits", hidden.shape[0], rows)))
        if parts is None:
            return None
        if len(parts) == 1:
            return parts[0].float()
        # What ranks hold beyond the vocabulary is padding. Cut before they are joined, so that rows lie end to end.
        starts = [rank * parts[0].shape[1] for rank in range(len(parts))]
        real = [part[:, : max(0, self.vocab_size - start)] for part, start in zip(parts, starts, strict=True)]
        return torch.cat(real, dim=1).float()
