"""What the engine asks of a model runner: one ordered plan a step, one result back.

A plan is data. It names every token to compute and every token to draw, in an order that all ranks of a tensor-parallel
group share; a runner holds no policy. Nothing here imports torch: the engine is tested on fakes of `ModelRunner`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from worker.engine.constraint import TokenMask

GREEDY_TEMPERATURE = 0.0

NO_TOKEN = -1
"""What stands for the id where edits and mask left none to draw."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one choice draws its tokens; every value is resolved, nothing is unset.

    Filters apply in this order to logits divided by `temperature`: top_k, then top_p, then min_p.
    """

    temperature: float = GREEDY_TEMPERATURE
    """0 is greedy (the highest logit, ties to the lower id); otherwise the divisor of the logits, > 0."""
    top_k: int = 0
    """Keep the k highest logits; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable ids whose probabilities sum to at least this, in (0, 1]."""
    min_p: float = 0.0
    """Drop ids less probable than this times the most probable id, in [0, 1)."""
    seed: int = 0
    """Key of the counter-based random numbers, an unsigned 64-bit integer."""
    repetition_penalty: float = 1.0
    """Divides positive logits, multiplies negative ones, of ids that prompt or output hold; 1 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a logit once for each time the output holds its id."""
    presence_penalty: float = 0.0
    """Subtracted from a logit if the output holds its id."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to logits, by id."""
    allowed_ids: Sequence[int] = ()
    """If not empty, no other id is drawn."""
    logprobs: int | None = None
    """How many alternatives the log-probabilities of a drawn id come with; None asks for none at all."""

    @property
    def greedy(self) -> bool:
        return self.temperature == GREEDY_TEMPERATURE

    @property
    def penalized(self) -> bool:
        """Whether a draw depends on which ids prompt and output hold."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed before a draw, ids banned at single positions aside."""
        return self.penalized or bool(self.logit_bias) or bool(self.allowed_ids)


@dataclass(frozen=True, slots=True)
class Draw:
    """A token to draw from the logits of a position."""

    params: SamplingParams
    choice: int
    """Index of the choice within its request: part of the random counter."""
    position: int
    """Index of the token to draw among the choice's generated ids, from 0: part of the random counter."""
    prompt_ids: Sequence[int] = ()
    generated_ids: Sequence[int] = ()
    """The choice's ids so far; like `prompt_ids`, given where the parameters have penalties."""
    banned_ids: Sequence[int] = ()
    """Ids that may not be drawn here."""
    mask: TokenMask | None = None
    """The only ids that may be drawn here, if there is a constraint."""

    @property
    def restricted(self) -> bool:
        """Whether there may be ids that can't be drawn."""
        return bool(self.params.allowed_ids or self.banned_ids) or self.mask is not None


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence that a step computes: positions `start` to `start + len(token_ids) - 1`."""

    token_ids: Sequence[int]
    """At least one id; one id is a decode, more are (a piece of) a prefill, or a decode with drafts behind it."""
    start: int
    """Position of the first id in the sequence; the KV of all earlier positions is in the block table's blocks."""
    block_table: Sequence[int]
    """Block ids in order; block i holds positions i * block_size to (i + 1) * block_size - 1. Covers this chunk."""
    draws: Sequence[Draw] = ()
    """What to draw from the logits of the last position: empty while more of the prompt is to come (then no logits are
    computed), several where choices of one request begin. With `drafts`, one for each of the last 1 + drafts positions:
    what is drawn at one tells whether the id behind it was right."""
    drafts: int = 0
    """How many of the last `token_ids` are guesses at what is drawn before them."""
    scored: Sequence[int] = ()
    """Ids whose log-probability is wanted: `scored[i]` as the one behind `token_ids[i]`."""
    scored_top: int = 0
    """How many alternatives come with each."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn id, with its log-probability and the most probable ids where asked for: before edits and filters."""

    token_id: int
    """`NO_TOKEN` where a restricted draw was left without an id."""
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    """(id, log-probability), most probable first, ties by id."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: chunks of distinct sequences, in the order in which results come back."""

    chunks: Sequence[Chunk]
    copies: Sequence[tuple[int, int]] = ()
    """(from, to): blocks whose keys and values are copied, one after another, before anything is computed."""

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


class ModelRunner(Protocol):
    """Executes steps against a KV cache of `num_blocks` blocks of `block_size` positions."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        """Copies blocks, computes every chunk, writes its keys and values to the cache, and returns one list a chunk:
        its `scored` ids with their log-probabilities, then what was drawn, in the order of its draws. Positions of
        drafts that were not drawn are computed anew by later steps. Any exception is fatal to the process that runs
        it."""
        ...


class Clock(Protocol):
    """Monotonic time, in seconds; tests bring their own."""

    def __call__(self) -> float: ...
