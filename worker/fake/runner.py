"""A model runner without a model: ids from a hash of all tokens before them, and time from a cost model.

What would be keys and values is one 64-bit mark a position: a hash of every token up to it, made from the mark before
it, which is read through the block table. So an id depends on every token of its sequence, a wrong or shared block
table changes ids or raises, and a decode takes the same time whatever the sequence's length.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from worker.engine.plan import Draw, Drawn, StepPlan

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_ODD = 0x9E37_79B9_7F4A_7C15  # 2**64 / golden ratio, as in Knuth's multiplicative hashing


@dataclass(frozen=True, slots=True)
class StepCost:
    """How long a step takes, in seconds: `fixed`, and `token` for each token that it computes."""

    fixed: float = 0.0
    token: float = 0.0

    def of(self, tokens: int) -> float:
        return self.fixed + self.token * tokens


class FakeRunner:
    """Implements `ModelRunner`.

    A draw depends on all tokens before it, on the choice, and, unless it is greedy, on the seed. It heeds allowed and
    banned ids and no other parameter. Log-probabilities are those of a model that is certain: 0.
    """

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int, cost: StepCost | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self._cost = cost or StepCost()
        self._marks = array("Q", bytes(8 * num_blocks * block_size))
        """Of every position of every block; 0 where nothing was computed."""

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        """Computes a step, and returns when it has taken as long as the cost model says. Raises RuntimeError where a
        position is read that was never computed."""
        started = time.monotonic()
        marks, size = self._marks, self.block_size
        for source, target in plan.copies:
            marks[target * size : (target + 1) * size] = marks[source * size : (source + 1) * size]
        drawn = []
        for chunk in plan.chunks:
            table = chunk.block_table
            mark = 0
            if chunk.start:
                block, slot = divmod(chunk.start - 1, size)
                mark = marks[table[block] * size + slot]
                if not mark:
                    raise RuntimeError(f"position {chunk.start - 1} was never computed")
            for position, token in enumerate(chunk.token_ids, chunk.start):
                mark = _after(mark, token)
                block, slot = divmod(position, size)
                marks[table[block] * size + slot] = mark
            drawn.append([self._draw(mark, draw) for draw in chunk.draws])
        if (left := started + self._cost.of(plan.num_tokens) - time.monotonic()) > 0:
            time.sleep(left)
        return drawn

    def _draw(self, mark: int, draw: Draw) -> Drawn:
        params = draw.params
        value = _drawn(mark, draw.choice, 0 if params.greedy else params.seed)
        if params.allowed_ids:
            allowed = [token for token in params.allowed_ids if token not in draw.banned_ids]
            token = allowed[value % len(allowed)]
        else:
            token = value % self.vocab_size
            while token in draw.banned_ids:
                token = (token + 1) % self.vocab_size
        if params.logprobs is None:
            return Drawn(token)
        return Drawn(token, 0.0, ((token, 0.0),) if params.logprobs else ())


def continuation(prompt: Sequence[int], count: int, vocab_size: int, *, seed: int = 0, choice: int = 0) -> list[int]:
    """The `count` ids that a fake worker generates behind a prompt: greedily for seed 0, else by the seed."""
    mark, ids = 0, []
    for token in prompt:
        mark = _after(mark, token)
    for _ in range(count):
        ids.append(_drawn(mark, choice, seed) % vocab_size)
        mark = _after(mark, ids[-1])
    return ids


def _after(mark: int, token: int) -> int:
    """The mark of a token behind one; never 0."""
    mixed = ((mark ^ token) * _ODD + 1) & _MASK
    return (mixed ^ (mixed >> 29)) or 1


def _drawn(mark: int, choice: int, seed: int) -> int:
    mixed = ((mark ^ seed ^ (choice << 48)) * _ODD) & _MASK
    mixed = ((mixed ^ (mixed >> 32)) * _ODD) & _MASK
    return mixed >> 24
