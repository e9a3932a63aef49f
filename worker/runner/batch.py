"""From a step plan to the arrays that kernels read. Plain numpy: torch's dispatch costs more than the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.engine.plan import Chunk, StepPlan
from worker.kernels import RaggedBatch


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A step, row by row: its tokens in the order of the plan."""

    ids: npt.NDArray[np.int64]
    """[tokens]"""
    positions: npt.NDArray[np.int64]
    """[tokens]"""
    slots: npt.NDArray[np.int64]
    """[tokens]: block * block_size + offset of each token's key and value."""
    hidden_rows: npt.NDArray[np.int64]
    """[R], rising: the rows whose hidden states are asked for."""
    draw_rows: npt.NDArray[np.int64]
    """[draws]: which of these R each draw is from."""
    ragged: RaggedBatch

    @property
    def last_layer_rows(self) -> npt.NDArray[np.int64]:
        """The rows that the last layer is to have results for: `hidden_rows`, or, as it takes one, the last row."""
        return self.hidden_rows if len(self.hidden_rows) else np.array([len(self.ids) - 1])

    def part(self, first: int, stop: int) -> StepArrays:
        """Rows `first` to `stop`, without draws: a step by itself, for which those before them must have been
        computed."""
        asked = self.hidden_rows[(self.hidden_rows >= first) & (self.hidden_rows < stop)]
        return StepArrays(
            self.ids[first:stop],
            self.positions[first:stop],
            self.slots[first:stop],
            asked - first,
            np.empty(0, np.int64),
            only_rows(self.ragged, np.arange(first, stop)),
        )


PART_ROWS = 128
"""Of the least part of a step that is worth computing by itself: weights are read for each."""
PARTS_PER_STAGE = 2
"""More of them leave stages less time without work, and cost more."""


def pipeline_parts(step: StepArrays, stages: int) -> Iterator[StepArrays]:
    """A step in parts that follow each other through a pipeline: a stage works on one while the next stage works on
    the one before it. A few rows are one part."""
    rows = len(step.ids)
    count = 1 if stages == 1 else max(1, min(PARTS_PER_STAGE * stages, rows // PART_ROWS))
    if count == 1:
        yield step
        return
    for index in range(count):
        yield step.part(rows * index // count, rows * (index + 1) // count)


def only_rows(ragged: RaggedBatch, rows: npt.NDArray[np.int64]) -> RaggedBatch:
    """The batch without its other rows; `rows` rise. Neighbours of one chunk stay one."""
    ends = np.cumsum(ragged.lengths)
    chunks = np.searchsorted(ends, rows, side="right")
    begins = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(chunks, prepend=-1) != 0))
    held = chunks[begins]
    return RaggedBatch(
        ragged.starts[held] + rows[begins] - (ends - ragged.lengths)[held],
        np.diff(begins, append=len(rows)),
        [ragged.block_tables[index] for index in held.tolist()],
        ragged.num_blocks,
        ragged.block_size,
    )


def build_step(
    plan: StepPlan, *, num_blocks: int, block_size: int, max_positions: int, vocab_size: int, every: bool = False
) -> StepArrays:
    """Asks for the hidden states that the plan's draws and scores are from, or for `every` row's. Raises ValueError for
    a plan that would read or write outside its blocks: an engine's bug."""
    chunks = plan.chunks
    lengths = np.fromiter((len(chunk.token_ids) for chunk in chunks), np.int64, len(chunks))
    starts = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks))
    tables = [np.asarray(chunk.block_table, np.int64) for chunk in chunks]
    sizes = np.fromiter((len(table) for table in tables), np.int64, len(chunks))
    ends = starts + lengths
    if any(chunk.drafts and len(chunk.draws) != 1 + chunk.drafts for chunk in chunks):
        raise ValueError("a chunk with drafts needs a draw in front of and behind each of them")
    if not len(chunks) or lengths.min() < 1 or starts.min() < 0:
        raise ValueError("a step needs chunks of at least one token, at positions from 0")
    if (ends > np.minimum(sizes * block_size, max_positions)).any():
        raise ValueError(f"a chunk ends beyond its block table or the model's {max_positions} positions")
    last_rows = np.cumsum(lengths) - 1
    ids = np.concatenate([np.asarray(chunk.token_ids, np.int64) for chunk in chunks])
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"a token id lies outside the vocabulary of {vocab_size}")
    positions = np.arange(len(ids)) - np.repeat(last_rows + 1 - ends, lengths)
    first_block = np.cumsum(sizes) - sizes
    blocks = np.concatenate(tables)
    if blocks.min() < 0 or blocks.max() >= num_blocks:
        raise ValueError(f"a block table names a block outside the cache's {num_blocks}")
    block_of = blocks[np.repeat(first_block, lengths) + positions // block_size]
    slots = block_of * block_size + positions % block_size
    draw_rows = _draw_rows(chunks, last_rows)
    if every or len(chunks) == len(ids):
        hidden_rows = np.arange(len(ids))
    else:
        first_rows = (last_rows + 1 - lengths).tolist()
        scored = [np.arange(at, at + len(c.scored)) for at, c in zip(first_rows, chunks, strict=True) if c.scored]
        hidden_rows = np.unique(np.concatenate((draw_rows, *scored)))
        draw_rows = np.searchsorted(hidden_rows, draw_rows)
    return StepArrays(
        ids,
        positions,
        slots,
        hidden_rows,
        draw_rows,
        RaggedBatch(starts, lengths, tables, num_blocks, block_size),
    )


def _draw_rows(chunks: Sequence[Chunk], last_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    rows = np.repeat(last_rows, [len(chunk.draws) for chunk in chunks])
    if any(chunk.drafts for chunk in chunks):
        back = [
            draft
            for chunk in chunks
            for draft in (range(chunk.drafts, -1, -1) if chunk.drafts else [0] * len(chunk.draws))
        ]
        rows -= np.array(back, np.int64)
    return rows
