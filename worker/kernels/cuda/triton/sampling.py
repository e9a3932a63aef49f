"""Drawing ids from logits: the order, cuts and numbers of `worker.kernels.reference.sampling`, without a sort.

What a row keeps is a cut: a value, and for ids that tie with it the last one kept. A cut is found digit by digit of the
value's ordered pattern: the greatest pattern at which enough ids, or enough of their mass, lie no lower. Tiles whose
highest value is below all that is looked for are passed over. Then every tile draws for itself, and the best one wins.
All sums run over tiles of fixed size, in order, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.cuda.triton.arithmetic import gumbel, key_value, order_key, philox
from worker.kernels.cuda.triton.configs import architecture, launch, power_of_two, tiles

TILE = 1024
"""Ids of a tile; part of what sums' bits depend on."""

_MIN_TEMPERATURE = tl.constexpr(1e-6)
"""Colder is greedy in effect, and would overflow float32; as in the reference."""


@dataclass(frozen=True, slots=True)
class Draws:
    """How each of S rows is drawn: `worker.kernels.SamplingBatch` on the GPU, all [S]."""

    temperature: Tensor
    """float32."""
    top_k: Tensor
    """int64."""
    top_p: Tensor
    """float64."""
    min_p: Tensor
    """float64."""
    seed: Tensor
    """int64 with the bits of the unsigned number."""
    choice: Tensor
    """int64."""
    position: Tensor
    """int64."""


@triton.jit
def _scaled(logits, row, token, vocabulary, temperature):
    """The row's values at some ids: logit / temperature, rounded as on a CPU; -inf past the vocabulary."""
    found = tl.load(logits + row * vocabulary + token, mask=token < vocabulary, other=float("-inf"))
    return tl.div_rn(found, tl.maximum(temperature, _MIN_TEMPERATURE))


@triton.jit
def peaks_kernel(logits, peaks, ids, vocabulary, TILE: tl.constexpr):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits + row * vocabulary + token, mask=token < vocabulary, other=float("-inf"))
    # uint32 patterns as int64: no reduction then depends on signs.
    key = tl.where(token < vocabulary, order_key(value).to(tl.int64), -1)
    best = tl.max(key, 0)
    place = row * tl.num_programs(1) + tile
    tl.store(peaks + place, best)
    tl.store(ids + place, tl.min(tl.where(key == best, token, vocabulary), 0))


@triton.jit
def _best(keys, ids, row, count, vocabulary, BLOCK: tl.constexpr):
    """The greatest key of the row's tiles, and its lowest id."""
    tile = tl.arange(0, BLOCK)
    key = tl.load(keys + row * count + tile, mask=tile < count, other=-1)
    token = tl.load(ids + row * count + tile, mask=tile < count, other=vocabulary)
    best = tl.max(key, 0)
    return best, tl.min(tl.where(key == best, token, vocabulary), 0)


@triton.jit
def winners_kernel(keys, ids, first_keys, first_ids, out, count, vocabulary, DRAWN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best, token = _best(keys, ids, row, count, vocabulary, BLOCK)
    # A row with nothing to draw from falls back to the first id of the order.
    if DRAWN and best < 0:
        best, token = _best(first_keys, first_ids, row, count, vocabulary, BLOCK)
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def _above(
    logits,
    peaks,
    row,
    count,
    vocabulary,
    temperature,
    peak,
    limit_key,
    limit_id,
    floor,
    TILE: tl.constexpr,
    MASS: tl.constexpr,
):
    """How much lies at keys of at least `floor` [4], of the ids that the limit keeps: ids or mass, float64 [4]."""
    total = tl.zeros((4,), tl.float64)
    least = tl.min(floor, 0)
    for tile in range(count):
        best = tl.load(peaks + row * count + tile)
        # Dividing keeps the order, so a tile's peak is that of its values.
        top = order_key(tl.div_rn(key_value(best.to(tl.uint32)), tl.maximum(temperature, _MIN_TEMPERATURE)))
        if top.to(tl.int64) >= least:
            token = tile * TILE + tl.arange(0, TILE)
            value = _scaled(logits, row, token, vocabulary, temperature)
            key = order_key(value).to(tl.int64)
            kept = (token < vocabulary) & ((key > limit_key) | ((key == limit_key) & (token <= limit_id)))
            if MASS:
                weight = tl.where(kept, tl.exp(value - peak), 0.0).to(tl.float64)
            else:
                weight = tl.where(kept, 1.0, 0.0).to(tl.float64)
            total += tl.sum(tl.where(key[:, None] >= floor[None, :], weight[:, None], 0.0), 0)
    return total


@triton.jit
def _pick(values, index, at):
    """Element `at` of a vector with the indexes `index`."""
    return tl.sum(tl.where(index == at, values, 0), 0)


@triton.jit
def _cut(
    logits,
    peaks,
    row,
    count,
    vocabulary,
    temperature,
    peak,
    limit_key,
    limit_id,
    wanted,
    TILE: tl.constexpr,
    MASS: tl.constexpr,
):
    """The shortest prefix of the order that holds `wanted`, as its last key and id."""
    digit = tl.arange(0, 4).to(tl.int64)
    low = tl.zeros((1,), tl.int64)
    for step in range(16):
        floor = low + (digit << (30 - 2 * step))
        total = _above(logits, peaks, row, count, vocabulary, temperature, peak, limit_key, limit_id, floor, TILE, MASS)
        # The first floor always holds enough; floors rise, and totals fall.
        low = low + (tl.sum(tl.where((digit > 0) & (total >= wanted), 1, 0), 0).to(tl.int64) << (30 - 2 * step))
    # How much lies above the cut's key, and how many of those that tie at it are still wanted.
    floor = low + tl.where(digit == 0, 1, 0)
    total = _above(logits, peaks, row, count, vocabulary, temperature, peak, limit_key, limit_id, floor, TILE, MASS)
    above = _pick(total, digit, 0)
    key = tl.max(low, 0)
    each = 1.0
    if MASS:
        each = tl.exp(key_value(key.to(tl.uint32)) - peak)
    needed = tl.maximum(tl.ceil((wanted - above) / each), 1.0).to(tl.int64)
    last = vocabulary.to(tl.int64)
    seen = needed * 0
    for tile in range(count):
        if seen < needed:
            token = tile * TILE + tl.arange(0, TILE)
            keys = order_key(_scaled(logits, row, token, vocabulary, temperature)).to(tl.int64)
            tied = (keys == key) & (token < vocabulary)
            running = seen + tl.cumsum(tied.to(tl.int64), 0)
            reached = tied & (running == needed)
            last = tl.where(tl.sum(reached.to(tl.int32), 0) > 0, tl.max(tl.where(reached, token, 0), 0), last)
            seen = tl.max(running, 0)
    return key, last


@triton.jit
def cuts_kernel(
    logits,
    peaks,
    temperatures,
    top_ks,
    top_ps,
    cut_keys,
    cut_ids,
    count,
    vocabulary,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    # All that is no NaN or -inf.
    key = tl.full((), 0x007FFFFF, tl.int64)
    last = vocabulary * tl.full((), 0, tl.int64) - 1
    best, _ = _best(peaks, peaks, row, count, vocabulary, BLOCK)
    top = key_value(best.to(tl.uint32))
    # Without a finite maximum there is no distribution.
    finite = (top > float("-inf")) & (top < float("inf"))
    if (temperature > 0) & finite:
        peak = tl.div_rn(top, tl.maximum(temperature, _MIN_TEMPERATURE))
        top_k, share = tl.load(top_ks + row), tl.load(top_ps + row)
        if (top_k > 0) & (top_k < vocabulary):
            key, last = _cut(
                logits, peaks, row, count, vocabulary, temperature, peak, key, last, top_k.to(tl.float64), TILE, False
            )
        if share < 1.0:
            digit = tl.arange(0, 4).to(tl.int64)
            mass = _above(logits, peaks, row, count, vocabulary, temperature, peak, key, last, digit * 0, TILE, True)
            wanted = _pick(mass, digit, 0) * share
            key, last = _cut(logits, peaks, row, count, vocabulary, temperature, peak, key, last, wanted, TILE, True)
    tl.store(cut_keys + row, key)
    tl.store(cut_ids + row, last)


@triton.jit
def scores_kernel(
    logits,
    peaks,
    first_ids,
    temperatures,
    min_ps,
    seeds,
    choices,
    positions,
    cut_keys,
    cut_ids,
    keys,
    ids,
    vocabulary,
    FILTERED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.num_programs(1)
    place = row * count + tile
    temperature = tl.load(temperatures + row)
    if temperature <= 0:
        tl.store(keys + place, tl.load(peaks + place))
        tl.store(ids + place, tl.load(first_ids + place))
    else:
        token = tile * TILE + tl.arange(0, TILE)
        value = _scaled(logits, row, token, vocabulary, temperature)
        key = order_key(value).to(tl.int64)
        kept = (token < vocabulary) & (value > float("-inf"))
        if FILTERED:
            cut = tl.load(cut_keys + row)
            kept &= (key > cut) | ((key == cut) & (token <= tl.load(cut_ids + row)))
            best, _ = _best(peaks, peaks, row, count, vocabulary, BLOCK)
            peak = tl.div_rn(key_value(best.to(tl.uint32)), tl.maximum(temperature, _MIN_TEMPERATURE))
            min_p = tl.load(min_ps + row)
            if min_p > 0:
                kept &= value >= peak + tl.log(min_p).to(tl.float32)
        score_key = tl.full((TILE,), -1, tl.int64)
        if tl.sum(kept.to(tl.int32), 0) > 0:
            seed = tl.load(seeds + row)
            zero = tl.zeros((TILE,), tl.uint32)
            word = philox(
                token.to(tl.uint32),
                zero + tl.load(positions + row).to(tl.uint32),
                zero + tl.load(choices + row).to(tl.uint32),
                zero + (seed & 0xFFFFFFFF).to(tl.uint32),
                zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
            )
            score = value + gumbel(word)
            score_key = tl.where(kept & (score == score), order_key(score).to(tl.int64), -1)
        best_score = tl.max(score_key, 0)
        tl.store(keys + place, best_score)
        tl.store(ids + place, tl.min(tl.where(score_key == best_score, token, vocabulary), 0))


def sample(logits: Tensor, draws: Draws, *, greedy: bool, filtered: bool) -> Tensor:
    """See `Kernels.sample`: float32 [S, V] to int64 [S].

    `greedy`: whether no temperature is above 0, so that one pass will do. `filtered`: whether any row may have top-k,
    top-p or min-p. Both may err to the slower side; a recorded graph's must.
    """
    rows, vocabulary = logits.shape
    device, count = logits.device, tiles(vocabulary, TILE)
    arch, block = architecture(device), power_of_two(count)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return out
    first_keys, keys = torch.empty(2, rows, count, dtype=torch.int64, device=device).unbind()
    first_ids, ids = torch.empty(2, rows, count, dtype=torch.int32, device=device).unbind()
    peaks_kernel[(rows, count)](logits, first_keys, first_ids, vocabulary, TILE=TILE, **launch("peaks", "any", arch))
    if not greedy:
        cut_keys, cut_ids = torch.empty(2, rows, dtype=torch.int64, device=device).unbind()
        if filtered:
            cuts_kernel[(rows,)](
                logits,
                first_keys,
                draws.temperature,
                draws.top_k,
                draws.top_p,
                cut_keys,
                cut_ids,
                count,
                vocabulary,
                TILE=TILE,
                BLOCK=block,
                **launch("cuts", "any", arch),
            )
        scores_kernel[(rows, count)](
            logits,
            first_keys,
            first_ids,
            draws.temperature,
            draws.min_p,
            draws.seed,
            draws.choice,
            draws.position,
            cut_keys,
            cut_ids,
            keys,
            ids,
            vocabulary,
            FILTERED=filtered,
            TILE=TILE,
            BLOCK=block,
            **launch("scores", "any", arch),
        )
    winners_kernel[(rows,)](
        first_keys if greedy else keys,
        first_ids if greedy else ids,
        first_keys,
        first_ids,
        out,
        count,
        vocabulary,
        DRAWN=not greedy,
        BLOCK=block,
        **launch("winners", "any", arch),
    )
    return out
