"""A tree of parts that a checkpoint names. Like torch.nn.Module, without what training needs: no parameters, modes or
hooks, whose lookups cost 1 to 2 µs a call, several hundred times a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T", bound="Module")


class Module:
    """A part of a model. What a step does with it is its `__call__`."""

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, in the order of their attributes, with their names in a checkpoint."""
        yield prefix, self
        for name, child in vars(self).items():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, Module):
                yield from child.named_modules(path)
            elif isinstance(child, ModuleList):
                for index, item in enumerate(child, child.first):
                    yield from item.named_modules(f"{path}.{index}")


class ModuleList(list[T]):
    """Modules named by their index, of which the list's first item has `first`."""

    def __init__(self, modules: Iterable[T], first: int = 0) -> None:
        super().__init__(modules)
        self.first = first
