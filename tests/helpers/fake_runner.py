"""A model runner without a model: its KV cache holds token ids and what they follow, and wrong ones make it fail."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from worker.engine.plan import Drawn, StepPlan


class FakeRunner:
    """Draws a token that depends on every token of the sequence, read back through the block table.

    A wrong block table, a block shared while it is written, or a position that was never computed changes the tokens or
    raises. So does a position that was computed behind other tokens than those before it, as keys and values are: a
    block copied from where another prefix came before.

    Args:
        memory: what it says depends on so many of the last tokens; None on all of them. With few it repeats itself.
    """

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = 1000, memory: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.memory = memory
        self.cache: list[list[tuple[int, int] | None]] = [[None] * block_size for _ in range(num_blocks)]
        """A position's token, and a mark of all tokens up to it."""
        self.steps: list[StepPlan] = []
        self.tokens_computed = 0

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        self.steps.append(plan)
        for source, target in plan.copies:
            self.cache[target] = self.cache[source][:]
        self.tokens_computed += plan.num_tokens
        for chunk in plan.chunks:
            mark = self._read(chunk.block_table, chunk.start)[1]
            for position, token in enumerate(chunk.token_ids, chunk.start):
                mark = hash((mark, token))
                block, slot = divmod(position, self.block_size)
                self.cache[chunk.block_table[block]][slot] = token, mark
        drawn: list[list[Drawn]] = []
        for chunk in plan.chunks:
            end = chunk.start + len(chunk.token_ids)
            tokens, _ = self._read(chunk.block_table, end)
            ends = range(end - chunk.drafts, end + 1) if chunk.drafts else [end] * len(chunk.draws)
            # A score tells what it was computed for: the position.
            scores = [Drawn(token, float(position)) for position, token in enumerate(chunk.scored, chunk.start)]
            tokens_drawn = [
                Drawn(self.next_token(tokens[:end], draw.choice)) for draw, end in zip(chunk.draws, ends, strict=True)
            ]
            drawn.append([*scores, *tokens_drawn])
        return drawn

    def next_token(self, tokens: Sequence[int], choice: int) -> int:
        """What it says after these tokens, to one of several choices."""
        known = tokens if self.memory is None else tokens[max(0, len(tokens) - self.memory) :]
        return next_token(known, self.vocab_size, choice)

    def _read(self, block_table: Sequence[int], count: int) -> tuple[list[int], int]:
        """The first `count` tokens that a block table holds, and the mark of the last."""
        tokens, mark = [], 0
        for position in range(count):
            block, slot = divmod(position, self.block_size)
            found = self.cache[block_table[block]][slot]
            if found is None:
                raise AssertionError(f"position {position} was never computed")
            token, found_mark = found
            mark = hash((mark, token))
            if found_mark != mark:
                raise AssertionError(f"position {position} was computed behind other tokens")
            tokens.append(token)
        return tokens, mark


def next_token(tokens: Sequence[int], vocab_size: int = 1000, choice: int = 0) -> int:
    """What the fake model says after these tokens, to one of several choices."""
    digest = hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in (choice, *tokens))).digest()
    return int.from_bytes(digest[:4], "little") % vocab_size


def continuation(prompt: Sequence[int], count: int, vocab_size: int = 1000, choice: int = 0) -> list[int]:
    """The `count` tokens that the fake model generates after a prompt, for one of several choices."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, vocab_size, choice))
    return tokens[len(prompt) :]
