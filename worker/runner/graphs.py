"""Decode steps as recorded graphs: a GPU gets one order a step instead of several a layer.

Invariant: a graph reads and writes the memory that it was recorded with, so everything that changes between steps lies
in `DecodeBuffers`, which are made once. There is a graph for each rung of a ladder of row counts; a step takes the
least rung that holds it, and its rows beyond the step's are dummies: they write to a block that no sequence has, and
read one position of it. Whoever fills the buffers fills them up to the rung, or a replay would write to the blocks of
rows that were there before.

Outputs of all rungs share memory: those of one replay are gone with the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.kernels.cuda.attention import CudaPlan
from worker.kernels.cuda.device import Graph, Recorder
from worker.kernels.cuda.flash import Paged
from worker.kernels.cuda.staging import Staging

FEW = (1, 2, 4)
STEP, FAR = 8, 128
"""Rungs are 8 apart up to 128 rows, 16 apart beyond: few rows more cost little, a graph a second of the start."""

Forward = Callable[[Tensor, Tensor, Tensor, CudaPlan], Tensor | None]
"""ids, positions and slots [rows] and their attention to float32 logits [rows, V]; None on ranks other than the
first of the last stage."""


def ladder(most: int) -> tuple[int, ...]:
    """Row counts that graphs are recorded for; the last one holds `most` rows."""
    rungs = [*FEW, *range(STEP, FAR, STEP)]
    while rungs[-1] < most:
        rungs.append(rungs[-1] + (STEP if rungs[-1] < FAR else 2 * STEP))
    return tuple(rungs[: 1 + next(index for index, rung in enumerate(rungs) if rung >= most)])


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """A decode step on the host, one row a sequence. All [rows] but `tables`."""

    positions: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    tables: npt.NDArray[np.int32]
    """[rows, blocks]."""

    @property
    def count(self) -> int:
        return len(self.positions)


class DecodeBuffers:
    """A decode step on the GPU, at addresses that stay.

    Args:
        rows: of the largest rung.
        blocks: of the longest sequence's table.
        dummy_block: the block that dummy rows have.
    """

    def __init__(self, rows: int, blocks: int, block_size: int, dummy_block: int, device: torch.device) -> None:
        self._dummy_block, self._block_size = dummy_block, block_size
        self._max_keys = blocks * block_size
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots = torch.full((rows,), dummy_block * block_size, dtype=torch.int64, device=device)
        self.key_lengths = torch.ones(rows, dtype=torch.int32, device=device)
        self.tables = torch.full((rows, blocks), dummy_block, dtype=torch.int32, device=device)
        # One query a row, whatever the step.
        self.query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)

    def plan(self, rows: int) -> CudaPlan:
        """Attention of the first `rows` rows."""
        starts = self.query_starts[: rows + 1]
        where = Paged(self.tables[:rows], self.key_lengths[:rows], starts, starts, 1, self._max_keys)
        return CudaPlan(where, decode_only=True)

    def fill(self, step: DecodeRows, ids: Tensor, rows: int, staging: Staging) -> None:
        """Takes in a step, padded with dummies to `rows`; `ids` [step.count] may be on their way through the GPU."""
        count, width = step.count, step.tables.shape[1]
        dummy = np.int64(self._dummy_block * self._block_size)
        positions = np.zeros(rows, np.int64)
        positions[:count] = step.positions
        slots = np.full(rows, dummy)
        slots[:count] = step.slots
        tables = np.full((rows, width), self._dummy_block, np.int32)
        tables[:count] = step.tables
        lengths = (positions + 1).astype(np.int32)
        uploaded = staging.upload(positions, slots, lengths, tables)
        for target, source in zip((self.positions, self.slots, self.key_lengths), uploaded, strict=False):
            target[:rows].copy_(source)
        self.tables[:rows, :width].copy_(uploaded[3])
        self.ids[:count].copy_(ids)


class DecodeGraphs:
    """A graph for each rung, recorded when this is made."""

    def __init__(self, rungs: Sequence[int], buffers: DecodeBuffers, forward: Forward, recorder: Recorder) -> None:
        self.rungs, self._buffers = tuple(rungs), buffers
        self._graphs: dict[int, tuple[Graph, Tensor | None]] = {}
        # The largest first: the others fit in the memory that it leaves.
        for rung in reversed(self.rungs):
            plan = buffers.plan(rung)
            ids, positions, slots = buffers.ids[:rung], buffers.positions[:rung], buffers.slots[:rung]
            forward(ids, positions, slots, plan)  # what is compiled or allocated at first must not be recorded
            # Bound now, as the loop goes on before a recorder that runs later has run it.
            self._graphs[rung] = recorder.record(_bound(forward, ids, positions, slots, plan))

    def rung(self, count: int) -> int | None:
        """The least rung for `count` rows; None where there are more than the largest has."""
        return next((rung for rung in self.rungs if rung >= count), None)

    def run(self, step: DecodeRows, ids: Tensor, staging: Staging) -> Tensor | None:
        """Logits [step.count, V] of a step, until the next `run`; None where `Forward` gives none.

        Raises ValueError for a step that no rung holds.
        """
        rung = self.rung(step.count)
        if rung is None:
            raise ValueError(f"a step of {step.count} rows is beyond the ladder's {self.rungs[-1]}")
        self._buffers.fill(step, ids, rung, staging)
        graph, logits = self._graphs[rung]
        graph.replay()
        return None if logits is None else logits[: step.count]


def _bound(
    forward: Forward, ids: Tensor, positions: Tensor, slots: Tensor, plan: CudaPlan
) -> Callable[[], Tensor | None]:
    return lambda: forward(ids, positions, slots, plan)
