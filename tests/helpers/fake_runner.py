"""A model runner without a model: its KV cache holds token ids, and it fails where they are not what they should be."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from worker.engine.plan import Drawn, StepPlan


class FakeRunner:
    """Draws a token that depends on every token of the sequence, read back through the block table.

    A wrong block table, a block shared while it is written, or a position that was never computed changes the tokens.
    """

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = 1000) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.cache: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.steps: list[StepPlan] = []
        self.tokens_computed = 0

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        self.steps.append(plan)
        for source, target in plan.copies:
            self.cache[target] = self.cache[source][:]
        self.tokens_computed += plan.num_tokens
        for chunk in plan.chunks:
            for offset, token in enumerate(chunk.token_ids):
                block, slot = divmod(chunk.start + offset, self.block_size)
                self.cache[chunk.block_table[block]][slot] = token
        drawn: list[list[Drawn]] = []
        for chunk in plan.chunks:
            end = chunk.start + len(chunk.token_ids)
            tokens = []
            for position in range(end):
                block, slot = divmod(position, self.block_size)
                found = self.cache[chunk.block_table[block]][slot]
                if found is None:
                    raise AssertionError(f"position {position} was never computed")
                tokens.append(found)
            drawn.append([Drawn(next_token(tokens, self.vocab_size, draw.choice)) for draw in chunk.draws])
        return drawn


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
