"""From the draws of a step to the edits of their logits. Plain numpy, and nothing at all where no draw asks for any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from worker.engine.plan import Draw
from worker.kernels.interface import Entries, LogitEdits


def build_edits(draws: Sequence[Draw], vocab_size: int) -> LogitEdits | None:
    """One row a draw; None if no logit changes. Waits for the masks."""
    if not any(draw.params.edits_logits or draw.restricted for draw in draws):
        return None
    repeated, added, banned = _Flat(), _Flat(), _Flat()
    allowed: dict[int, npt.NDArray[np.int64]] = {}
    masks: dict[int, npt.NDArray[np.bool_]] = {}
    for row, draw in enumerate(draws):
        params = draw.params
        if params.repetition_penalty != 1.0:
            seen = np.unique(np.fromiter((*draw.prompt_ids, *draw.generated_ids), np.int64))
            repeated.add(row, seen, np.full(len(seen), params.repetition_penalty, np.float32))
        shifts = _shifts(draw)
        if shifts:
            added.add(row, np.fromiter(shifts, np.int64), np.fromiter(shifts.values(), np.float32))
        if params.allowed_ids:
            allowed[row] = np.array(sorted(set(params.allowed_ids)), np.int64)
        if draw.mask is not None:
            masks[row] = _mask(draw.mask.bits(), vocab_size)
        if draw.banned_ids:
            ids = np.array(sorted(set(draw.banned_ids)), np.int64)
            banned.add(row, ids, np.zeros(len(ids), np.float32))
    return LogitEdits(repeated.entries(), added.entries(), allowed, masks, banned.entries())


def _shifts(draw: Draw) -> dict[int, float]:
    """What is added to single logits, by id in rising order, summed in float64 so that no order of addition shows."""
    params = draw.params
    shifts = dict(params.logit_bias)
    if params.frequency_penalty or params.presence_penalty:
        ids, counts = np.unique(np.fromiter(draw.generated_ids, np.int64, len(draw.generated_ids)), return_counts=True)
        for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
            penalty = params.presence_penalty + count * params.frequency_penalty
            shifts[token] = shifts.get(token, 0.0) - penalty
    return dict(sorted(shifts.items()))


def _mask(bits: bytes, vocab_size: int) -> npt.NDArray[np.bool_]:
    packed = np.frombuffer(bits, np.uint8)[: -(-vocab_size // 8)]
    mask = np.zeros(vocab_size, np.bool_)
    count = min(vocab_size, 8 * len(packed))
    mask[:count] = np.unpackbits(packed, count=count, bitorder="little")
    return mask


class _Flat:
    """Entries in the making."""

    def __init__(self) -> None:
        self._rows: list[npt.NDArray[np.int64]] = []
        self._ids: list[npt.NDArray[np.int64]] = []
        self._values: list[npt.NDArray[np.float32]] = []

    def add(self, row: int, ids: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        self._rows.append(np.full(len(ids), row, np.int64))
        self._ids.append(ids)
        self._values.append(values)

    def entries(self) -> Entries:
        if not self._rows:
            return Entries(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        return Entries(np.concatenate(self._rows), np.concatenate(self._ids), np.concatenate(self._values))
