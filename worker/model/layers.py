"""The layers that hold weights. Each says what it wants from a checkpoint (`wanted`) and takes it over (`take`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.kernels import Kernels


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
    """A table looked up by id."""

    weight: Tensor

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.parts = (Part((vocab_size, hidden_size), vocab_size),)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight = tensors["weight"]

    def forward(self, ids: Tensor) -> Tensor:
        return torch.embedding(self.weight, ids)
