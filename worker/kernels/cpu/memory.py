"""Memory for what steps read: weights, keys and values."""

from __future__ import annotations

import mmap
from contextlib import suppress
from types import ModuleType

import torch
from torch import Tensor


def zeros(nbytes: int, large: bool = False) -> Tensor:
    """uint8 [nbytes] at the start of a page, whose pages take neither memory nor time until they are written.

    Of a mapping that is this process's own: the pages of a shared one, which lie in memory as they come, were read 2 to
    4% more slowly. `large`: a write takes a page of 2 MiB, where the system has one at hand.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def populate(module: ModuleType, tensor: Tensor) -> None:
    """Gives memory to all of a contiguous tensor, in large pages where the system has them: some milliseconds for each
    2 MiB. Steps may run meanwhile."""
    module.populate(tensor.data_ptr(), tensor.nbytes)
