"""What the engine asks of whoever holds a choice to a format: which ids may come next, and where that leaves it.

Nothing here knows grammars: the engine is tested on fakes of `ConstraintState`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol


class Standing(Enum):
    """How a choice stands to its constraint."""

    OPEN = "open"
    """More may follow."""
    COMPLETE = "complete"
    """It is what the constraint asks for, and nothing may follow."""
    STUCK = "stuck"
    """It is not, and nothing may follow either."""
    FAILED = "failed"
    """Finding out took more work than it may: the whole request is given up."""


class TokenMask(Protocol):
    """The ids that may be drawn next. Computed elsewhere while the forward pass runs."""

    def bits(self) -> bytes:
        """Waits for it: id i is allowed if bit i % 8 of byte i // 8 is set; ids beyond the last byte are not. Empty
        where nothing may be drawn."""
        ...


class ConstraintState(Protocol):
    """Where one choice stands. Constraint and ids make it what it is, and nothing else: not when or how often it was
    asked. Called by one thread at a time."""

    def mask(self) -> TokenMask:
        """For the id behind those taken in so far; begins to compute it and doesn't wait. The same one until `advance`,
        however often a preempted sequence comes back for it."""
        ...

    def masks_behind(self, ids: Sequence[int]) -> Sequence[TokenMask]:
        """For the ids behind each of `ids`, were these taken in one after another; begins to compute them and doesn't
        wait. Empty behind an id that may not come; no id is one of those that end a choice. Changes nothing."""
        ...

    def advance(self, token: int) -> Standing:
        """Takes in the id that was drawn, which is none of those that end a choice."""
        ...

    def undrawn(self) -> Standing:
        """How it stands when no id could be drawn: what the mask allows, other bans may not. Never OPEN."""
        ...

    def fork(self) -> ConstraintState:
        """A state of its own for another choice with the same ids."""
        ...
