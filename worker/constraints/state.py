"""Where a choice stands in its grammar: the engine's `ConstraintState` over a matcher of llguidance."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
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

    @classmethod
    def of(cls, mask: tuple[bytes, Standing]) -> PendingMask:
        """One that is computed already."""
        future: Future[tuple[bytes, Standing]] = Future()
        future.set_result(mask)
        return cls(future)

    def bits(self) -> bytes:
        return self._future.result()[0]

    @property
    def standing(self) -> Standing:
        """Waits for the mask. Anything but OPEN means that it is empty."""
        return self._future.result()[1]


class MaskAhead:
    """A mask behind ids that are not drawn yet: a `TokenMask`."""

    def __init__(self, ahead: Future[list[GrammarState]], index: int) -> None:
        self._ahead, self._index = ahead, index

    def bits(self) -> bytes:
        states = self._ahead.result()
        return states[self._index].mask().bits() if self._index < len(states) else b""


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
        self._ahead: Future[list[GrammarState]] | None = None
        """States behind the ids that masks were asked for ahead of time, as far as these may come."""
        self._ids_ahead: Sequence[int] = ()

    def mask(self) -> PendingMask:
        if self._pending is None:
            self._pending = PendingMask(self._masks.submit(self._compute))
        return self._pending

    def masks_behind(self, ids: Sequence[int]) -> list[MaskAhead]:
        self.mask()
        self._ids_ahead = ids
        self._ahead = self._masks.submit(self._look_ahead)
        return [MaskAhead(self._ahead, index) for index in range(len(ids))]

    def advance(self, token: int) -> Standing:
        self._settle()
        if self._ahead is not None:
            states, ids, self._ahead, self._ids_ahead = self._ahead.result(), self._ids_ahead, None, ()
            if states and ids[0] == token:
                self._become(states[0])
                if states[1:]:
                    self._ahead, self._ids_ahead = Future(), ids[1:]
                    self._ahead.set_result(states[1:])
                return Standing.OPEN
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
        return self._twin()

    def _twin(self) -> GrammarState:
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
        if self._ahead is not None:
            self._ahead.result()

    def _become(self, other: GrammarState) -> None:
        """Takes over a state that nobody else has."""
        self._matcher, self._free, self._may_think = other._matcher, other._free, other._may_think
        self._pending, self._accepting = other._pending, other._accepting

    def _look_ahead(self) -> list[GrammarState]:
        """Copies of this state, each one id and one mask behind the one before it."""
        states = [self]
        try:
            # It was asked for first, so it is computed or nearly.
            bits = self.mask().bits()
            for token in self._ids_ahead:
                if token // 8 >= len(bits) or not bits[token // 8] >> token % 8 & 1:
                    break
                state = states[-1]._twin()
                if state.advance(token) is not Standing.OPEN:
                    break
                state._pending = PendingMask.of(state._compute())
                bits = state._pending.bits()
                states.append(state)
        except Exception:
            log.exception("no masks could be computed ahead")
        return states[1:]

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
