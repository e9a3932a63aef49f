"""Edits of logits on the GPU: `worker.kernels.reference.logits`, with every index brought there first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.kernels.cuda.staging import Staging
from worker.kernels.interface import Entries, LogitEdits


def edit_logits(logits: Tensor, edits: LogitEdits, staging: Staging) -> None:
    """See `Kernels.edit_logits`."""
    if len(edits.repeated.rows):
        rows, ids, penalty = _entries(edits.repeated, staging)
        found = logits[rows, ids]
        logits[rows, ids] = torch.where(found > 0, found / penalty, found * penalty)
    if len(edits.added.rows):
        rows, ids, values = _entries(edits.added, staging)
        logits[rows, ids] += values
    if edits.allowed:
        rows, ids = staging.upload(_owners(edits.allowed), np.concatenate(list(edits.allowed.values())))
        kept = logits[rows, ids]
        logits.index_fill_(0, _rows(edits.allowed, staging), -torch.inf)
        logits[rows, ids] = kept
    if edits.masks:
        (masks,) = staging.upload(np.stack([~mask for mask in edits.masks.values()]))
        rows = _rows(edits.masks, staging)
        logits[rows] = logits[rows].masked_fill_(masks, -torch.inf)
    if len(edits.banned.rows):
        rows, ids, _ = _entries(edits.banned, staging)
        logits[rows, ids] = -torch.inf


def _entries(entries: Entries, staging: Staging) -> tuple[Tensor, Tensor, Tensor]:
    rows, ids, values = staging.upload(entries.rows, entries.ids, entries.values)
    return rows, ids, values


def _rows(by_row: Mapping[int, npt.NDArray[np.generic]], staging: Staging) -> Tensor:
    return staging.upload(np.fromiter(by_row, np.int64, len(by_row)))[0]


def _owners(by_row: Mapping[int, npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """The row of each id."""
    return np.repeat(np.fromiter(by_row, np.int64, len(by_row)), [len(ids) for ids in by_row.values()])
