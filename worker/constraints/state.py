"""Where a choice stands in its grammar: the engine's `ConstraintState` over a matcher of llguidance."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import llguidance

from worker.engine.constraint import Standing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What masks are made of."""

    size: int
    end_ids: frozenset[int]
    """Ids that end the model's answer: a grammar allows them where its output may end."""
    all_but_ends: bytes
    think: tuple[int, int] | None
    """The ids that open and close a thinking section, if the model has them."""


class PendingMask:
    """A mask that is being computed: a `TokenMask`."""

    def __init__(self, future: Future[tuple[bytes, Standing]]) -> None:
        self._future = future

    def bits(self) -> bytes:
        return self._future.result()[0]

    @property
    def standing(self) -> Standing:
        """Waits for the mask. Anything but OPEN means that it is empty."""
        return self._future.result()[1]


class GrammarState:
    """A `ConstraintState`.

    Args:
        matcher: this state's own, behind the ids so far. While a mask is computed nobody else touches it.
        masks: where masks are computed.
        may_end: whether the ids that end an answer may be drawn.
        free: whether a thinking section is open, within which the matcher sees nothing.
        may_think: whether one may open with the next id.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        vocabulary: Vocabulary,
        masks: Executor,
        *,
        may_end: bool,
        free: bool = False,
        may_think: bool = False,
    ) -> None:
        self._matcher, self._vocabulary, self._masks = matcher, vocabulary, masks
        self._may_end, self._free, self._may_think = may_end, free, may_think
        self._pending: PendingMask | None = None
        self._accepting = False
        """Whether the output could end here; known once the mask is."""

    def mask(self) -> PendingMask:
        if self._pending is None:
            self._pending = PendingMask(self._masks.submit(self._compute))
        return self._pending

    def advance(self, token: int) -> Standing:
        self._settle()
        self._pending = None
        think = self._vocabulary.think
        if self._free:
            self._free = think is None or token != think[1]
            return Standing.OPEN
        if self._may_think:
            self._may_think = False
            self._free = think is not None and token == think[0]
            if self._free:
                return Standing.OPEN
        if not self._matcher.consume_token(token):
            return self._failed()
        if self._matcher.is_stopped():
            return Standing.COMPLETE if self._matcher.is_accepting() else self._failed()
        return Standing.OPEN

    def undrawn(self) -> Standing:
        standing = self.mask().standing
        if standing is not Standing.OPEN:
            return standing
        return Standing.COMPLETE if self._accepting else Standing.STUCK

    def fork(self) -> GrammarState:
        self._settle()
        twin = GrammarState(
            self._matcher.deep_copy(),
            self._vocabulary,
            self._masks,
            may_end=self._may_end,
            free=self._free,
            may_think=self._may_think,
        )
        twin._pending, twin._accepting = self._pending, self._accepting
        return twin

    def replay(self, ids: Iterable[int]) -> Standing:
        """Takes in ids that were drawn elsewhere. Not within a step: there may be many."""
        standing = Standing.OPEN
        for token in ids:
            standing = self.advance(token)
            if standing is not Standing.OPEN:
                break
        return standing

    def _settle(self) -> None:
        """Waits for the mask that is being computed: the matcher is in use until then."""
        if self._pending is not None:
            self._pending.bits()

    def _compute(self) -> tuple[bytes, Standing]:
        try:
            return self._bits()
        except Exception:
            log.exception("a mask could not be computed")  # the request's end, not the step's
            return b"", Standing.FAILED

    def _bits(self) -> tuple[bytes, Standing]:
        vocabulary = self._vocabulary
        if self._free:
            return vocabulary.all_but_ends, Standing.OPEN
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            return b"", self._failed()
        ends = [token for token in vocabulary.end_ids if bits[token // 8] >> token % 8 & 1]
        for token in ends:
            bits[token // 8] &= ~(1 << token % 8) & 0xFF
        if self._may_think and vocabulary.think is not None:
            token = vocabulary.think[0]
            bits[token // 8] |= 1 << token % 8
        self._accepting = bool(ends)
        if bits.count(0) == len(bits):
            return b"", Standing.COMPLETE if ends else Standing.STUCK
        if self._may_end:
            for token in ends:
                bits[token // 8] |= 1 << token % 8
        return bytes(bits), Standing.OPEN

    def _failed(self) -> Standing:
        reason = self._matcher.get_error()
        # What the library calls an error as well: nothing can follow.
        return Standing.STUCK if reason.startswith("NoExtension") else Standing.FAILED
