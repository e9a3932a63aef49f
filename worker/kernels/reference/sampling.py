"""Drawing ids from logits.

Invariant: every filter keeps a prefix of one order, (logit / temperature falling, id rising), so what a row keeps is a
cut: a value, and for ids that tie with it the last id kept. Cuts are found among the row's highest values; the
vocabulary is never sorted. Sums run over the ordered values in float64, or over fixed tiles of the vocabulary, so that
they do not depend on the batch or the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.kernels.interface import SamplingBatch
from worker.kernels.philox import MAX_GUMBEL, gumbel, philox

_SUM_TILE = 1024
_HEAD = 64
_WIDTHS = (_HEAD, 1024, 8192)
"""How many of the highest values are looked at, in turn, to find a cut; past the last, they are counted in buckets."""

_MIN_TEMPERATURE = 1e-6
"""Colder is greedy in effect, and would overflow float32."""

_PIECE = 1 << 15
"""Candidates scored at a time: their words stay in the second-level cache."""


class Selection(Protocol):
    """What drawing asks of a backend: passes over whole rows of float32 logits [S, V]. The draw itself is shared."""

    def argmax(self, logits: Tensor) -> Tensor:
        """The id of each row's greatest value, ties to the lower id, NaN above everything: int64 [S]."""
        ...

    def top_values(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` greatest values of each row, falling, and their ids, [S, count]. Which of equal values at the end
        are taken, and the order of equal ones, is open."""
        ...

    def total_mass(self, logits: Tensor, peak: Tensor) -> Tensor:
        """Sum of exp(logit - peak) over the vocabulary, float64 [S], in an order that V alone fixes."""
        ...

    def divide(self, logits: Tensor, rows: Tensor, divisors: Tensor) -> None:
        """Divides the rows `rows` (int64) by float32 `divisors`, in place."""
        ...

    def words(self, ids: Tensor, rows: Tensor, counters: Counters) -> Tensor:
        """A random word below 2^32 for each candidate: the first that Philox makes of its id and its row's counters.
        All int64."""
        ...


@dataclass(frozen=True, slots=True)
class Counters:
    """What random words depend on besides the id; int64 [S], the seed's bits those of the unsigned number."""

    position: Tensor
    choice: Tensor
    seed: Tensor


class TorchSelection:
    """Implements `Selection` in plain torch."""

    def argmax(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

    def top_values(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        top = logits.topk(count)
        return top.values, top.indices

    def total_mass(self, logits: Tensor, peak: Tensor) -> Tensor:
        weights = torch.exp(logits - peak[:, None])
        padded = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _SUM_TILE))
        return padded.view(len(logits), -1, _SUM_TILE).sum(-1, dtype=torch.float64).sum(-1)

    def divide(self, logits: Tensor, rows: Tensor, divisors: Tensor) -> None:
        logits[rows] /= divisors[:, None]

    def words(self, ids: Tensor, rows: Tensor, counters: Counters) -> Tensor:
        seed = counters.seed[rows]
        counter = (ids, counters.position[rows], counters.choice[rows], torch.zeros_like(ids))
        return philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[0]


TORCH = TorchSelection()


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sampled rows: what is kept of each, and its random numbers. All [S]."""

    value: Tensor
    """Ids above this value are kept, and ids equal to it up to `last_id`. -inf keeps all ids whose logit is finite."""
    last_id: Tensor
    floor: Tensor
    """Ids whose value is at least this are kept (min-p); applies on top of the cut."""
    counters: Counters
    selection: Selection

    def scores(self, values: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """value + Gumbel noise for flat candidates, -inf for those that are not kept."""
        bound = self.value[rows]
        kept = ((values > bound) | ((values == bound) & (ids <= self.last_id[rows]))) & (values >= self.floor[rows])
        noise = gumbel(self.selection.words(ids, rows, self.counters))
        return torch.where(kept, values + noise, -torch.inf)


def sample(logits: Tensor, batch: SamplingBatch, selection: Selection = TORCH) -> Tensor:
    """See `Kernels.sample`."""
    tokens = selection.argmax(logits)
    sampled = np.flatnonzero(batch.temperature > 0)
    if not len(sampled):
        return tokens
    rows = torch.from_numpy(sampled)
    temperature = torch.from_numpy(np.maximum(batch.temperature[sampled], np.float32(_MIN_TEMPERATURE)))
    selection.divide(logits, rows, temperature)
    values = _chosen(logits, rows)
    head_values, head_ids = selection.top_values(values, min(_HEAD, values.shape[1]))
    peak = head_values[:, 0]
    value, last_id = _cuts(values, head_values, batch.top_k[sampled], batch.top_p[sampled], selection)
    with np.errstate(divide="ignore"):
        log_min_p = torch.from_numpy(np.log(batch.min_p[sampled]).astype(np.float32))
    position, choice, seed = batch.position[sampled], batch.choice[sampled], batch.seed[sampled].view(np.int64)
    counters = Counters(*(torch.from_numpy(array) for array in (position, choice, seed)))
    kept = _Rows(value, last_id, peak + log_min_p, counters, selection)
    tokens[rows] = _race(values, head_values, head_ids, kept, tokens[rows])
    return tokens


def _race(values: Tensor, head_values: Tensor, head_ids: Tensor, kept: _Rows, default: Tensor) -> Tensor:
    """The id with the greatest score in each row, ties to the lower id.

    Exact pruning: the head's best score is a bound, and an id that lies more than the greatest possible noise below it
    cannot win. So the rest of a row is scored only where its values come near enough.
    """
    count, width = head_values.shape
    head_rows = torch.arange(count).repeat_interleave(width)
    flat_ids, flat_values = head_ids.flatten(), head_values.flatten()
    scores = kept.scores(flat_values, flat_ids, head_rows)
    best = scores.view(count, width).amax(-1)
    # The slack covers rounding in `value + noise`, however large the values.
    reach = torch.where(best > -torch.inf, best - MAX_GUMBEL - best.abs() * 1e-6, -torch.inf)
    bound = torch.maximum(torch.maximum(reach, kept.value), kept.floor)
    open_rows = torch.nonzero(head_values[:, -1] >= bound).flatten() if width < values.shape[1] else head_rows[:0]
    if len(open_rows):
        local, ids = torch.nonzero(values[open_rows] >= bound[open_rows, None], as_tuple=True)
        rows = open_rows[local]
        pieces = [
            kept.scores(values[row_piece, id_piece], id_piece, row_piece)
            for row_piece, id_piece in zip(torch.split(rows, _PIECE), torch.split(ids, _PIECE), strict=True)
        ]
        # Ids of the head come up twice, with equal scores: harmless.
        scores = torch.cat((scores, *pieces))
        flat_ids, head_rows = torch.cat((flat_ids, ids)), torch.cat((head_rows, rows))
        best = best.scatter_reduce(0, head_rows, scores, "amax")
    winners = (scores == best[head_rows]) & (scores > -torch.inf)
    none_yet = torch.full_like(default, values.shape[1])
    won = none_yet.scatter_reduce(0, head_rows[winners], flat_ids[winners], "amin")
    # A row with nothing to draw from (all logits -inf or NaN) falls back to its first id in the order.
    return torch.where(won < values.shape[1], won, default)


def _cuts(
    values: Tensor,
    head: Tensor,
    top_k: npt.NDArray[np.int64],
    top_p: npt.NDArray[np.float64],
    selection: Selection,
) -> tuple[Tensor, Tensor]:
    """The cut (value, last id) that top-k and then top-p leave of each row; `head` are its highest values."""
    vocab, peak = values.shape[1], head[:, 0]
    value = torch.full_like(peak, -torch.inf)
    last_id = torch.full(peak.shape, -1, dtype=torch.int64)
    limit = torch.from_numpy(np.where((top_k > 0) & (top_k < vocab), top_k, vocab))
    share = torch.from_numpy(top_p)
    # A row without a finite maximum has no distribution; `_race` settles it.
    pending = torch.nonzero(((limit < vocab) | (share < 1.0)) & torch.isfinite(peak)).flatten()
    mass = torch.zeros(peak.shape, dtype=torch.float64)
    unlimited = pending[limit[pending] == vocab]
    if len(unlimited):
        mass[unlimited] = selection.total_mass(_chosen(values, unlimited), peak[unlimited])
    for width in _WIDTHS:
        if not len(pending):
            break
        width = min(width, vocab)
        if width == head.shape[1]:
            top = _chosen(head, pending)
        else:
            top = selection.top_values(_chosen(values, pending), width)[0]
        keep, found = _count_kept(top, peak[pending], limit[pending], share[pending], mass[pending])
        # One value past the cut must be in view, to see whether it ties with the last one kept.
        found &= (keep < width) | (width == vocab)
        done = pending[found]
        top, keep = top[found], keep[found]
        last = top.gather(1, keep[:, None] - 1)
        allowed = keep - (top > last).sum(-1)
        value[done], last_id[done] = last.squeeze(1), vocab
        for index in torch.nonzero((top == last).sum(-1) > allowed).flatten().tolist():
            row = done[index]
            ties = torch.nonzero(values[row] == last[index]).flatten()
            last_id[row] = ties[allowed[index] - 1]
        pending = pending[~found]
    for row in pending.tolist():
        value[row], last_id[row] = _cut_by_buckets(values[row], int(limit[row]), float(share[row]))
    return value, last_id


def _chosen(rows: Tensor, chosen: Tensor) -> Tensor:
    """Some of the rows, in order; not a copy where that is all of them."""
    return rows if len(chosen) == len(rows) else rows[chosen]


def _count_kept(top: Tensor, peak: Tensor, limit: Tensor, share: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """How many of a row's highest values top-k and top-p keep, and whether `top` reached far enough to tell.

    `mass` is the row's total where top-k does not limit it; elsewhere the total is that of the k highest values.
    """
    width = top.shape[1]
    running = torch.exp(top - peak[:, None]).cumsum(-1, dtype=torch.float64)
    limited = running.gather(1, limit.clamp_max(width)[:, None] - 1).squeeze(1)
    in_view = limit <= width
    wanted = torch.where(in_view & (mass == 0), limited, mass) * share
    reached = running >= wanted[:, None]
    first = reached.to(torch.int8).argmax(-1) + 1
    met = reached[:, -1] & (share < 1.0)
    keep = torch.where(met, torch.minimum(first, limit), limit)
    found = (in_view | (met & (mass > 0))) & (keep <= width)
    return keep.clamp_max(width), found


def _cut_by_buckets(values: Tensor, limit: int, share: float) -> tuple[Tensor, Tensor]:
    """The cut of one row [V] whose kept ids are too many for `_WIDTHS`: flat distributions and very large k.

    Values are counted into 65,536 buckets by the upper half of their float32 pattern, whose order is theirs; only the
    bucket that holds the cut is looked at closely.
    """
    values = values + 0.0  # -0.0 equals 0.0 and must share its pattern
    bits = values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    ordered = torch.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits | 0x80000000)
    falling = 0xFFFF - (ordered >> 16)
    weights = torch.exp(values - values.amax()).to(torch.float64)
    value, last_id = torch.tensor(-torch.inf), torch.tensor(-1)
    if limit < len(values):
        ones = torch.ones_like(weights)
        value, last_id = _cut_in_bucket(values, falling, ones, float(limit))
        ids = torch.arange(len(values))
        weights = weights * ((values > value) | ((values == value) & (ids <= last_id)))
    if share < 1.0:
        total = torch.nn.functional.pad(weights, (0, -len(weights) % _SUM_TILE)).view(-1, _SUM_TILE).sum(-1).sum()
        value, last_id = _cut_in_bucket(values, falling, weights, float(total) * share)
    return value, last_id


def _cut_in_bucket(values: Tensor, falling: Tensor, weights: Tensor, wanted: float) -> tuple[Tensor, Tensor]:
    """The shortest prefix of the order whose weights sum to `wanted`, as a cut."""
    # bincount and cumsum add up in the order of ids and buckets, one thread a row.
    running = torch.bincount(falling, weights, minlength=1 << 16).cumsum(0)
    bucket = int((running >= min(wanted, float(running[-1]))).to(torch.int8).argmax())
    before = float(running[bucket - 1]) if bucket else 0.0
    ids = torch.nonzero((falling == bucket) & (weights > 0)).flatten()
    # Stable, so ties stay in the order of their ids.
    order = values[ids].sort(descending=True, stable=True).indices
    ids = ids[order]
    reached = before + weights[ids].cumsum(0) >= wanted
    last = int(reached.to(torch.int8).argmax()) if bool(reached.any()) else len(ids) - 1
    return values[ids[last]], ids[last]
