"""A sequence: one choice of one request, as the engine sees it.

What is left to compute is never stored: it is `total - computed`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from enum import Enum

from worker.engine.plan import SamplingParams


class EndReason(Enum):
    """Why a sequence has all of its tokens."""

    EOS = "eos"
    STOP_TOKEN = "stop token"  # noqa: S105
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Request:
    """What the engine is asked to do, validated by whoever asks."""

    key: Hashable
    """Names the request to whoever asked; unique while it lives."""
    prompt_ids: Ids[int]
    """At least one id."""
    generated_ids: Ids[int] = ()
    """Ids that were generated before, elsewhere: generation goes on behind them."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 1
    """Generated ids in all, those of `generated_ids` counted."""
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    deadline: float = math.inf
    """On the engine's clock, in seconds."""
    prefix_root: bytes = b""
    """What the hashes of its blocks start from: requests share blocks only under the same root."""
    use_prefix_cache: bool = True


@dataclass(slots=True, eq=False)
class SequenceState:
    """A request in the engine. Compared by identity: two requests may be alike."""

    request: Request
    arrival: float
    tokens: list[int]
    """Prompt and generated ids."""
    computed: int = 0
    """Positions whose keys and values are in `blocks`."""
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Hashes of the leading full blocks of `tokens`, as far as they were needed."""
    published: int = 0
    """How many leading blocks are known to the pool by their hash."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it first ran."""
    first_scheduled: float | None = None
    preemptions: int = 0

    @classmethod
    def of(cls, request: Request, arrival: float) -> SequenceState:
        return cls(request, arrival, [*request.prompt_ids, *request.generated_ids])

    @property
    def total(self) -> int:
        return len(self.tokens)

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def num_generated(self) -> int:
        """Generated ids, those of earlier attempts counted."""
        return len(self.tokens) - len(self.request.prompt_ids)

    def end_reason(self) -> EndReason | None:
        """Whether the newest token is the last."""
        newest = self.tokens[-1]
        if newest in self.request.stop_ids:
            return EndReason.STOP_TOKEN
        if newest in self.request.eos_ids:
            return EndReason.EOS
        return EndReason.LENGTH if self.num_generated >= self.request.max_tokens else None
