"""Steps of few rows as recorded kernel calls: what Python does for all layers, it does once for each size of step.

Invariant: a recording reads and writes the memory that it was made with. What changes between steps lies in buffers
that are made once; what was allocated while a step was recorded lives as long as the recording; weights, caches and a
runner's buffers stay where they are. A step is kept only if compiled kernels are all that it took: whatever else torch
computes while it is recorded would be missing when it is replayed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from worker.kernels import KVCache
from worker.kernels.cpu import CpuKernels
from worker.kernels.cpu.attention import CpuPlan, chunk_arrays
from worker.model.qwen import Buffers
from worker.runner.batch import StepArrays

MOST = 128
"""Recordings that are kept, some 100 kB each; the one that was not used for longest goes first."""

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, CpuPlan], Tensor | None]
"""ids, cos, sin, slots and attention of a step to its hidden states, of a model that is in one stage."""

_FREE = frozenset({"empty", "empty_like", "view", "stride", "data_ptr", "is_contiguous", "dim", "__get__", "__len__"})
"""What torch may do in a step besides: none of it reads or writes an element."""


class _Watch(TorchFunctionMode):
    """Keeps the tensors that come up, and notices what torch computes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.computed: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.kept.append(result)
        # Slices are views, other indexes copy; `contiguous` copies where it doesn't give back what it got.
        view = func is Tensor.__getitem__ and isinstance(args[1], slice)
        same = func is Tensor.contiguous and result is args[0]
        if not (view or same or func.__name__ in _FREE):
            self.computed.add(func.__name__)
        return result


@dataclass(frozen=True, slots=True)
class _Recording:
    run: Callable[[], None]
    hidden: Tensor
    kept: Sequence[Tensor]


class Replay:
    """Runs the steps of one model on one cache.

    Args:
        caches: kept, since recordings hold their addresses.
        cos, sin: float32 [positions, head_dim / 2].
        blocks: of the longest sequence.
    """

    def __init__(self, kernels: CpuKernels, caches: Sequence[KVCache], cos: Tensor, sin: Tensor, blocks: int) -> None:
        rows = Buffers.ROWS
        self._native, self._caches = kernels.native, caches
        self._turns = cos.numpy(), sin.numpy()
        # Of numpy, whose small operations cost a third of torch's.
        self._rows = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        """Ids and slots."""
        self._row_turns = np.zeros((rows, cos.shape[1]), np.float32), np.zeros((rows, cos.shape[1]), np.float32)
        """Of the rows' positions."""
        self._chunks = tuple(np.zeros(size, np.int64) for size in (rows, rows, rows * blocks, rows))
        """Room for what `chunk_arrays` makes of a step."""
        self._recordings: OrderedDict[tuple[int, int], _Recording] = OrderedDict()
        """By rows and chunks."""
        self._met: set[tuple[int, int]] = set()
        """Sizes that came up once: recording costs more than a step that isn't."""
        self._usable = True

    def run(self, step: StepArrays, forward: Forward) -> Tensor | None:
        """The step's hidden states, in memory that the next step writes to; None if it is left to whoever asks."""
        size = len(step.ids), len(step.ragged.lengths)
        if not self._usable or size[0] > Buffers.ROWS:
            return None
        if size not in self._met:
            self._met.add(size)
            return None
        self._fill(step)
        recording = self._recordings.get(size)
        if recording is None:
            return self._record(*size, forward)
        self._recordings.move_to_end(size)
        recording.run()
        return recording.hidden

    def _fill(self, step: StepArrays) -> None:
        rows = len(step.ids)
        for turns, of_rows in zip(self._turns, self._row_turns, strict=True):
            # Without a mode, numpy buffers what it writes to `out`. Positions were checked where the step was built.
            turns.take(step.positions, axis=0, out=of_rows[:rows], mode="clip")
        sources = step.ids, step.slots, *chunk_arrays(step.ragged)
        for target, source in zip((*self._rows, *self._chunks), sources, strict=True):
            target[: len(source)] = source

    def _record(self, rows: int, count: int, forward: Forward) -> Tensor:
        plan = CpuPlan.over(rows, self._chunks, count)
        ids, slots = (torch.from_numpy(array[:rows]) for array in self._rows)
        cos, sin = (torch.from_numpy(array[:rows]) for array in self._row_turns)
        inputs = ids, cos, sin, slots
        program = self._native.Program()
        watch = _Watch()
        program.record()
        try:
            with watch:
                hidden = forward(*inputs, plan)
        finally:
            program.stop()
        if hidden is None:
            raise RuntimeError("a stage of a pipeline can't be recorded")
        self._usable = program.complete and not watch.computed
        if self._usable:
            self._recordings[rows, count] = _Recording(program.run, hidden, (*inputs, *watch.kept))
            if len(self._recordings) > MOST:
                self._recordings.popitem(last=False)
        return hidden
