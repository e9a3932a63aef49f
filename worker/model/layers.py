"""The layers that hold weights. Each says what it wants from a checkpoint (`wanted`) and takes it over (`take`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.kernels import Kernels
from worker.parallel import Group


@dataclass(frozen=True, slots=True)
class Part:
    """One stored weight of a layer, whole, as a checkpoint holds it."""

    shape: tuple[int, ...]
    units: int
    """Equal units that ranks share out along the split dimension: heads, features or ids."""
    bias: bool = False


class Layer(nn.Module, ABC):
    """A layer with weights."""

    parts: tuple[Part, ...]
    """Stacked in this order along the first dimension; `worker.model.plan.MERGED` names them if there are several."""

    @abstractmethod
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over "weight" and, where its parts have one, "bias": this rank's share, in the model's dtype."""


class Linear(Layer):
    """x @ weight.T + bias, over one stored weight or several merged ones."""

    def __init__(self, kernels: Kernels, *parts: Part) -> None:
        super().__init__()
        self.kernels, self.parts = kernels, parts
        self.prepared: Any = None

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        self.prepared = self.kernels.prepare_linear(tensors["weight"], tensors.get("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.prepared)


class RowLinear(Linear):
    """A linear layer whose ranks each hold some of the input features; their products are summed over the group."""

    def __init__(self, kernels: Kernels, group: Group, part: Part) -> None:
        super().__init__(kernels, part)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return self.group.sum(super().forward(x))


class RMSNorm(Layer):
    """Root mean square norm, fused with the residual sum before it."""

    weight: Tensor

    def __init__(self, kernels: Kernels, size: int, eps: float) -> None:
        super().__init__()
        self.kernels, self.eps = kernels, eps
        self.parts = (Part((size,), 1),)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight = tensors["weight"]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.kernels.rms_norm(x, self.weight, self.eps, residual)


class Embedding(Layer):
    """A table looked up by id. Each rank holds some of its rows and gives zeros for the ids of others."""

    weight: Tensor

    def __init__(self, group: Group, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.group = group
        self.parts = (Part((vocab_size, hidden_size), vocab_size),)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight = tensors["weight"]

    def forward(self, ids: Tensor) -> Tensor:
        if self.group.world == 1:
            return torch.embedding(self.weight, ids)
        rows = self.weight.shape[0]
        own = ids - self.group.rank * rows
        foreign = (own < 0) | (own >= rows)
        found = torch.embedding(self.weight, own.clamp(0, rows - 1)).masked_fill_(foreign[:, None], 0.0)
        return self.group.sum(found)


class Head(Linear):
    """The projection to logits. Each rank computes those of its share of the ids; rank 0 gets all."""

    def __init__(self, kernels: Kernels, group: Group, vocab_size: int, hidden_size: int) -> None:
        super().__init__(kernels, Part((vocab_size, hidden_size), vocab_size))
        self.group, self.vocab_size = group, vocab_size

    def logits(self, hidden: Tensor, count: int) -> Tensor | None:
        """The first `count` rows' logits, float32 [count, V], on rank 0; None on the others."""
        parts = self.group.gather(self(hidden)[:count])
        if parts is None:
            return None
        if len(parts) == 1:
            return parts[0].float()
        # What ranks hold beyond the vocabulary is padding. Cut before they are joined, so that rows lie end to end.
        starts = [rank * parts[0].shape[1] for rank in range(len(parts))]
        real = [part[:, : max(0, self.vocab_size - start)] for part, start in zip(parts, starts, strict=True)]
        return torch.cat(real, dim=1).float()
