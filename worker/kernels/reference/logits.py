"""What happens to logits besides drawing: edits before it, and log-probabilities beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.kernels.interface import LogitEdits
from worker.kernels.reference.sampling import TORCH, Selection


def edit_logits(logits: Tensor, edits: LogitEdits) -> None:
    """See `Kernels.edit_logits`."""
    if len(edits.repeated.rows):
        rows, ids = torch.from_numpy(edits.repeated.rows), torch.from_numpy(edits.repeated.ids)
        penalty, found = torch.from_numpy(edits.repeated.values), logits[rows, ids]
        logits[rows, ids] = torch.where(found > 0, found / penalty, found * penalty)
    if len(edits.added.rows):
        rows, ids = torch.from_numpy(edits.added.rows), torch.from_numpy(edits.added.ids)
        logits[rows, ids] += torch.from_numpy(edits.added.values)
    for row, allowed in edits.allowed.items():
        kept = torch.from_numpy(allowed)
        only = torch.full_like(logits[row], -torch.inf)
        only[kept] = logits[row, kept]
        logits[row] = only
    for row, mask in edits.masks.items():
        logits[row].masked_fill_(torch.from_numpy(~mask), -torch.inf)
    if len(edits.banned.rows):
        logits[torch.from_numpy(edits.banned.rows), torch.from_numpy(edits.banned.ids)] = -torch.inf


def logprobs(logits: Tensor, tokens: Tensor, count: int, selection: Selection = TORCH) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernels.logprobs`."""
    count = min(count, logits.shape[1])
    peak = logits.amax(-1)
    log_total = (peak.double() + selection.total_mass(logits, peak).log()).float()
    drawn = logits.gather(1, tokens[:, None]).squeeze(1) - log_total
    if not count:
        none = logits.new_empty(len(logits), 0)
        return drawn, none.long(), none
    values, ids = selection.top_values(logits, count)
    for row in range(len(logits)):
        # The selection leaves open which of equal values it takes, and in which order.
        near = torch.nonzero(logits[row] >= values[row, -1]).flatten()
        order = logits[row, near].sort(descending=True, stable=True).indices[:count]
        ids[row], values[row] = near[order], logits[row, near[order]]
    return drawn, ids, values - log_total[:, None]
