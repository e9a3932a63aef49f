"""What all layers of a step share of attention: which rows belong to which sequence, and where its keys lie.

One `CudaPlan` serves flash-attn and our own kernels; that of a graph is made of tensors that stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.kernels.cuda.flash import Paged
from worker.kernels.cuda.staging import Staging
from worker.kernels.interface import RaggedBatch


@dataclass(frozen=True, slots=True)
class CudaPlan:
    """A step's attention. Sequences are in the order of their rows."""

    where: Paged
    decode_only: bool
    """Whether every sequence has one row."""


def plan_attention(batch: RaggedBatch, staging: Staging) -> CudaPlan:
    """See `Kernels.plan_attention`."""
    ends = batch.starts + batch.lengths
    tables = padded_tables(batch.block_tables)
    uploaded = staging.upload(tables, ends.astype(np.int32), _running(batch.lengths), _running(ends))
    where = Paged(
        tables=uploaded[0],
        key_lengths=uploaded[1],
        query_starts=uploaded[2],
        key_starts=uploaded[3],
        max_queries=int(batch.lengths.max()),
        max_keys=int(ends.max()),
    )
    return CudaPlan(where, where.max_queries == 1)


def padded_tables(tables: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int32]:
    """Block tables as int32 [sequences, blocks of the longest]; what is missing is block 0, which nothing reads."""
    out = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, table in zip(out, tables, strict=True):
        row[: len(table)] = table
    return out


def _running(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    sums = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=sums[1:])
    return sums
