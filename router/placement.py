"""Which worker takes a request.

A policy sees candidates, never links: each says what it has to do and how much of the prompt it holds. What a candidate
has to do counts from the moment a request is sent there, not from when the worker reports it, or a burst would all go
to the one that looked free.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

STREAM_TOKENS = 32
"""What a running stream counts, in prompt tokens: it slows a newcomer as much as waiting for these to be computed."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that could take the request."""

    index: int
    """Its place among the router's workers: breaks ties."""
    streams: int
    """Requests placed there and not ended."""
    pending_tokens: int
    """Prompt tokens of those that are still to be computed."""
    capacity: int
    """Streams that run there at once; more wait."""
    cached_tokens: int
    """Tokens of this prompt that its prefix cache holds."""

    @property
    def load(self) -> int:
        """How much a newcomer waits for, in prompt tokens."""
        return self.pending_tokens + STREAM_TOKENS * self.streams

    @property
    def queues(self) -> bool:
        """Whether a newcomer would have to wait for another's end."""
        return self.streams >= self.capacity


class Policy(Protocol):
    """Chooses one of at least one candidate."""

    def choose(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate: ...


class PrefixPolicy:
    """The least wait until the prompt is computed: the worker's load and the tokens that it doesn't hold. A hot prefix
    spreads by itself as soon as waiting costs more than computing it anew."""

    def choose(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        return min(
            candidates,
            key=lambda worker: (
                worker.queues,
                worker.load + prompt_tokens - worker.cached_tokens,
                worker.load,
                worker.index,
            ),
        )


class LeastLoadedPolicy:
    """The least load, whatever the caches hold."""

    def choose(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        return min(candidates, key=lambda worker: (worker.queues, worker.load, worker.index))


class RoundRobinPolicy:
    """One after another."""

    def __init__(self) -> None:
        self._turns = itertools.count()

    def choose(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        return candidates[next(self._turns) % len(candidates)]


POLICIES: dict[str, Callable[[], Policy]] = {
    "prefix": PrefixPolicy,
    "least-loaded": LeastLoadedPolicy,
    "round-robin": RoundRobinPolicy,
}
