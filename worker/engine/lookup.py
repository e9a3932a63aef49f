"""Guesses at what a sequence says next: what followed where its newest ids came before (prompt lookup, Saxena 2023).

Invariant: `_previous[p]` is the newest place before `p` whose pair of ids, (tokens[p - 1], tokens[p]), hashes as that
of `p` does, and `_heads` names the newest place of each hash: chains that only ever grow at their new end. The index
takes 4 bytes a token, and 4 for each of 2 to 4 times as many heads, of which there are 65,536 at most.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

CANDIDATES = 8
"""Earlier places that are looked at, newest first."""
LONGEST_MATCH = 16
"""Ids before a place that are compared: of two places that agree on so many, the newer one is taken."""
SHORTEST_MATCH = 2

_NOWHERE = -1
_LEAST_HEADS = 1 << 8
_MOST_HEADS = 1 << 16
_MIX = (0x9E3779B1, 0x85EBCA77)


class Lookup:
    """The index over one sequence, whose tokens are only ever added to."""

    def __init__(self) -> None:
        self._heads = array("i")
        self._previous = array("i")

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` ids that may follow `tokens`: none where the last ones never came before.

        The place whose ids before it agree longest is gone on from; where that comes to the end of what there is, in a
        text that repeats itself, it goes on into the guess.
        """
        self._extend(tokens)
        last = len(tokens) - 1
        best, longest = _NOWHERE, SHORTEST_MATCH - 1
        place = self._previous[last] if last > 0 else _NOWHERE
        for _ in range(CANDIDATES):
            if place == _NOWHERE:
                break
            length = 0
            while length < LONGEST_MATCH and length <= place and tokens[place - length] == tokens[last - length]:
                length += 1
            if length > longest:
                best, longest = place, length
                if length == LONGEST_MATCH:
                    break
            place = self._previous[place]
        if best == _NOWHERE:
            return []
        guess = list(tokens[best + 1 : best + 1 + count])
        for index in range(len(guess), count):
            guess.append(guess[index - (last - best)])
        return guess

    def _extend(self, tokens: Sequence[int]) -> None:
        done, total = len(self._previous), len(tokens)
        if done == 0 or (total > len(self._heads) and len(self._heads) < _MOST_HEADS):
            self._build(tokens)
            return
        heads, previous, mask = self._heads, self._previous, len(self._heads) - 1
        for place in range(done, total):
            slot = _slot(tokens[place - 1], tokens[place], mask)
            previous.append(heads[slot])
            heads[slot] = place

    def _build(self, tokens: Sequence[int]) -> None:
        """The index anew, with room for twice as many tokens: a prompt comes all at once."""
        size = _LEAST_HEADS
        while size < min(2 * len(tokens), _MOST_HEADS):
            size *= 2
        ids = np.asarray(tokens, np.int64)
        slots = _slot(ids[:-1], ids[1:], size - 1)
        order = np.argsort(slots, kind="stable")
        chained = slots[order[1:]] == slots[order[:-1]]
        previous = np.full(len(ids), _NOWHERE, np.int32)
        previous[order[1:][chained] + 1] = order[:-1][chained] + 1
        heads = np.full(size, _NOWHERE, np.int32)
        newest = np.append(~chained, True)[: len(order)]
        heads[slots[order[newest]]] = order[newest] + 1
        self._previous, self._heads = array("i", previous.tobytes()), array("i", heads.tobytes())


def _slot(first: Any, second: Any, mask: int) -> Any:
    """Of one pair of ids, or of an array of them."""
    mixed = first * _MIX[0] + second * _MIX[1]
    return (mixed ^ mixed >> 15) & mask
