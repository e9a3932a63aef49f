"""Guesses at what a sequence says next: what followed where its newest ids came before (prompt lookup, Saxena 2023).

Invariant: `_previous[p]` is the newest place before `p` whose pair of ids, (tokens[p - 1], tokens[p]), hashes as that
of `p` does, and `_heads` names the newest place of each hash: chains that only ever grow at their new end. The index
takes 4 bytes a token, and 16 to 256 KiB for its heads.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

CANDIDATES = 8
"""Earlier places that are looked at, newest first."""
LONGEST_MATCH = 16
"""Ids before a place that are compared: of two places that agree on so many, the newer one is taken."""
SHORTEST_MATCH = 2
PER_STEP = 4096
"""Tokens of a new prompt that are indexed at a time, in about a millisecond."""

_NOWHERE = -1
_LEAST_HEADS = 1 << 12
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
        if not self._extend(tokens):
            return []
        last = len(tokens) - 1
        best, longest = _NOWHERE, SHORTEST_MATCH - 1
        place = self._previous[last]
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

    def _extend(self, tokens: Sequence[int]) -> bool:
        """Adds what is new; whether that is all of it."""
        heads, previous = self._heads, self._previous
        if not heads:
            size = _LEAST_HEADS
            while size < min(2 * len(tokens), _MOST_HEADS):
                size *= 2
            self._heads = heads = array("i", [_NOWHERE]) * size
            previous.append(_NOWHERE)
        mask, done = len(heads) - 1, len(previous)
        for place in range(done, min(len(tokens), done + PER_STEP)):
            mixed = tokens[place - 1] * _MIX[0] + tokens[place] * _MIX[1]
            slot = (mixed ^ mixed >> 15) & mask
            previous.append(heads[slot])
            heads[slot] = place
        return len(previous) == len(tokens)
