"""The compiled kernels under test: every instruction set that this machine has."""

from __future__ import annotations

from types import ModuleType

import pytest

from worker.kernels.cpu import native


def instruction_sets() -> list[str]:
    """Fails where the module of an instruction set that this machine has wasn't built."""
    names: list[str] = native.load("portable")[1].instruction_sets()
    return names


each_isa = pytest.mark.parametrize("isa", instruction_sets())


def module(isa: str, threads: int = 1) -> ModuleType:
    """That instruction set's kernels, on `threads` threads, not pinned."""
    loaded = native.load(isa)[1]
    if loaded.num_threads() != threads:
        loaded.set_threads(threads, [])
    return loaded
