"""Edits of logits in place: see `Kernels.edit_logits`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.cuda.triton.configs import architecture, launch, tiles


@triton.jit
def mask_kernel(logits, rows, words, vocabulary, width, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + index)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    word = tl.load(words + index * width + token // 32, mask=inside & (token // 32 < width), other=0)
    banned = ((word >> (token % 32)) & 1) == 0
    hidden = tl.full((BLOCK,), float("-inf"), tl.float32)
    tl.store(logits + row * vocabulary + token, hidden, mask=inside & banned)


def mask_logits(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """Ids whose bit is 0 become -inf in float32 `logits` [S, V].

    `rows` int64 [M]: each mask's row. `words` int32 [M, W]: id i's bit is bit i % 32 of word i // 32, as llguidance has
    them; ids past the last word are not allowed.
    """
    config = launch("mask", "any", architecture(logits.device))
    vocabulary = logits.shape[1]
    if len(rows):
        mask_kernel[(len(rows), tiles(vocabulary, config["BLOCK"]))](
            logits, rows, words, vocabulary, words.shape[1], **config
        )


REPEAT, ADD, BAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["count"])
def entries_kernel(logits, rows, ids, values, count, vocabulary, EDIT: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = index < count
    place = logits + tl.load(rows + index, mask=real, other=0) * vocabulary + tl.load(ids + index, mask=real, other=0)
    if EDIT == BAN:
        tl.store(place, tl.full((BLOCK,), float("-inf"), tl.float32), mask=real)
    else:
        found = tl.load(place, mask=real, other=0.0)
        value = tl.load(values + index, mask=real, other=1.0)
        penalized = tl.where(found > 0, tl.div_rn(found, value), found * value)
        edited = penalized if EDIT == REPEAT else found + value
        tl.store(place, edited, mask=real)


def _edit(logits: Tensor, rows: Tensor, ids: Tensor, values: Tensor, edit: int) -> None:
    config = launch("entries", "any", architecture(logits.device))
    if len(rows):
        entries_kernel[(tiles(len(rows), config["BLOCK"]),)](
            logits, rows, ids, values, len(rows), logits.shape[1], EDIT=edit, **config
        )


def penalize_repeated(logits: Tensor, rows: Tensor, ids: Tensor, values: Tensor) -> None:
    """`LogitEdits.repeated`: int64 [n], int64 [n], float32 [n]."""
    _edit(logits, rows, ids, values, REPEAT.value)


def add_to_logits(logits: Tensor, rows: Tensor, ids: Tensor, values: Tensor) -> None:
    """`LogitEdits.added`: int64 [n], int64 [n], float32 [n]."""
    _edit(logits, rows, ids, values, ADD.value)


def ban(logits: Tensor, rows: Tensor, ids: Tensor) -> None:
    """`LogitEdits.banned`: int64 [n] twice."""
    _edit(logits, rows, ids, logits, BAN.value)
