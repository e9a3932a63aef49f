"""A sequence: one choice of one request, as the engine sees it.

What is left to compute is never stored: it is `total - computed`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from enum import Enum

from qwire.ordering import Claim
from worker.engine.constraint import ConstraintState, Standing, TokenMask
from worker.engine.plan import NO_TOKEN, Draw, Drawn, SamplingParams
from worker.engine.speculation import Guesses


class EndReason(Enum):
    """Why a sequence has all of its tokens."""

    EOS = "eos"
    STOP_TOKEN = "stop token"  # noqa: S105
    CONSTRAINT = "constraint"
    """Its constraint is met and allows nothing more."""
    DEAD_END = "dead end"
    """No id could be drawn."""
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Request:
    """What the engine is asked to do, validated by whoever asks."""

    key: Hashable
    """Names the request to whoever asked; unique while it lives."""
    prompt_ids: Ids[int]
    """At least one id."""
    choices: Ids[Ids[int]] = ((),)
    """One a choice: ids that were generated before, elsewhere; generation goes on behind them."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 1
    """Generated ids of a choice in all, those in `choices` counted."""
    min_tokens: int = 0
    """Until so many ids are generated, no id ends a choice: such ids are not drawn."""
    bad_words: Ids[Ids[int]] = ()
    """Sequences of ids whose last one is not drawn behind the others."""
    constraints: Ids[ConstraintState] = ()
    """If there are any, one a choice: where it stands behind the ids in `choices`. They are the engine's to advance."""
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    deadline: float = math.inf
    """On the engine's clock, in seconds."""
    prefix_root: bytes = b""
    """What the hashes of its blocks start from: requests share blocks only under the same root."""
    use_prefix_cache: bool = True
    ended: frozenset[int] = frozenset()
    """Choices of which nothing more is wanted; others keep their indexes."""
    waited: float = 0.0
    """Seconds that it had waited elsewhere when it was submitted."""
    moved: bool = False
    """An engine had it before: it is taken where others find the queue full."""
    suspect: bool = False
    """An engine may have failed because of it."""
    prompt_logprobs: int | None = None
    """How many alternatives the log-probabilities of the prompt's ids come with; None asks for none at all."""
    tenant: bytes = b""
    priority: int = 0
    """See qwire.ordering."""

    @property
    def first_choice(self) -> int:
        """The first choice that isn't ended."""
        return next(choice for choice in range(len(self.choices)) if choice not in self.ended)


@dataclass(slots=True, eq=False)
class SequenceState:
    """A request in the engine. Compared by identity: two requests may be alike."""

    request: Request
    arrival: float
    choice: int
    tokens: list[int]
    """Prompt and generated ids."""
    unborn: int = 0
    """Choices behind this one that begin when this one draws its first token: they share its prompt."""
    computed: int = 0
    """Positions whose keys and values are in `blocks`."""
    blocks: list[int] = field(default_factory=list)
    dropped: int = 0
    """How many leading entries of `blocks` are no longer its own: no window reaches back to them."""
    hashes: list[bytes] = field(default_factory=list)
    """Hashes of the leading full blocks of `tokens`, as far as they were needed."""
    published: int = 0
    """How many leading blocks are known to the pool by their hash."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it first ran."""
    first_scheduled: float | None = None
    level: int = 0
    """What its priority counted as when it began to run."""
    constraint: ConstraintState | None = None
    standing: Standing = Standing.OPEN
    """How it stands to its constraint."""
    prompt_scores: list[Drawn] = field(default_factory=list)
    """The log-probabilities of the prompt's ids behind the first, as far as they are known."""
    guesses: Guesses = field(default_factory=Guesses)
    """Of what is drawn for it."""
    claim: Claim = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        began = self.arrival - request.waited
        self.claim = Claim(request.tenant, request.priority, request.deadline, began)

    @classmethod
    def of(cls, request: Request, arrival: float) -> list[SequenceState]:
        """The sequences that a request begins with. Choices of which nothing is generated yet are one sequence until
        their prompt is computed; others find what they share in the prefix cache."""
        count = len(request.choices)
        constraints: Ids[ConstraintState | None] = request.constraints or [None] * count
        if count > 1 and not any(request.choices) and not request.ended:
            return [cls(request, arrival, 0, list(request.prompt_ids), unborn=count - 1, constraint=constraints[0])]
        return [
            cls(request, arrival, choice, [*request.prompt_ids, *generated], constraint=constraint)
            for choice, (generated, constraint) in enumerate(zip(request.choices, constraints, strict=True))
            if choice not in request.ended
        ]

    def fork(self, choice: int, token: int) -> SequenceState:
        """Another choice that begins with `token` behind the same prompt; it has no blocks yet."""
        child = SequenceState(
            self.request,
            self.arrival,
            choice,
            list(self.request.prompt_ids),
            hashes=self.hashes[:],
            cached_tokens=self.cached_tokens,
            first_scheduled=self.first_scheduled,
            constraint=self.constraint.fork() if self.constraint is not None else None,
        )
        child.take(token)
        return child

    def take(self, token: int) -> None:
        """Takes in what was drawn for it: an id, or `NO_TOKEN`."""
        if token == NO_TOKEN:
            self.standing = self.constraint.undrawn() if self.constraint is not None else Standing.STUCK
            return
        self.tokens.append(token)
        if self.constraint is not None and token not in self.request.stop_ids and token not in self.request.eos_ids:
            self.standing = self.constraint.advance(token)

    def draw(self, choice: int) -> Draw:
        """How the next token of this sequence is drawn, or the first of a choice that begins with it."""
        return self._draw(choice, (), self.constraint.mask() if self.constraint is not None else None)

    def draws(self, drafts: Ids[int]) -> list[Draw]:
        """How its next token is drawn, and those behind each of `drafts`, were they what is drawn before."""
        masks: Ids[TokenMask | None] = [None] * len(drafts)
        own = self.draw(self.choice)
        if self.constraint is not None:
            masks = self.constraint.masks_behind(drafts)
        behind = [self._draw(self.choice, drafts[: count + 1], mask) for count, mask in enumerate(masks)]
        return [own, *behind]

    def _draw(self, choice: int, drafts: Ids[int], mask: TokenMask | None) -> Draw:
        request = self.request
        penalized = request.sampling.penalized
        return Draw(
            request.sampling,
            choice,
            self.num_generated + len(drafts),
            prompt_ids=request.prompt_ids if penalized else (),
            generated_ids=[*self.tokens[len(request.prompt_ids) :], *drafts] if penalized else (),
            banned_ids=self._banned(drafts) if request.min_tokens or request.bad_words else (),
            mask=mask,
        )

    def _banned(self, drafts: Ids[int]) -> list[int]:
        request = self.request
        banned: list[int] = []
        if self.num_generated + len(drafts) < request.min_tokens:
            banned += sorted(request.eos_ids | request.stop_ids)
        if request.bad_words:
            newest = [*self.tokens[max(len(request.prompt_ids), self.total - self._longest_bad_word) :], *drafts]
            for *before, last in request.bad_words:
                if len(before) <= len(newest) and newest[len(newest) - len(before) :] == before:
                    banned.append(last)
        return banned

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are to come: then all of it is computed, in order, here."""
        request = self.request
        return (
            request.prompt_logprobs is not None
            and self.choice == request.first_choice
            and len(self.prompt_scores) < len(request.prompt_ids) - 1
        )

    def to_score(self, count: int) -> Ids[int]:
        """Ids whose log-probability is wanted where the next `count` tokens are computed."""
        if not self.scores_prompt:
            return ()
        return self.request.prompt_ids[self.computed + 1 : self.computed + count + 1]

    def take_scores(self, scores: Ids[Drawn]) -> None:
        """Takes in those of the tokens that were computed last; before it is said that they were."""
        if self.computed == 0:  # for the first time, or anew
            self.prompt_scores.clear()
        self.prompt_scores += scores

    @property
    def _longest_bad_word(self) -> int:
        return max(map(len, self.request.bad_words))

    def guess(self, most: int, worth: float) -> list[int]:
        """Ids that may be drawn for it next, at most `most`, where that pays; see `Guesses.make`. None of them ends it:
        nothing is drawn behind such an id."""
        request = self.request
        # As many are drawn as are guessed, and one more.
        most = min(most, request.max_tokens - self.num_generated - 1)
        if most < 1:
            return []
        guess = self.guesses.make(self.tokens, most, worth)
        for index, token in enumerate(guess):
            if token in request.stop_ids or token in request.eos_ids:
                return guess[:index]
        return guess

    @property
    def total(self) -> int:
        return len(self.tokens)

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def unproven(self) -> bool:
        """Whether it may be what makes steps fail: a suspect's, and no step has given it a token."""
        return self.request.suspect and self.num_generated == len(self.request.choices[self.choice])

    @property
    def num_generated(self) -> int:
        """Generated ids, those of earlier attempts counted."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def held(self) -> list[int]:
        """Its own blocks, in the order of its block table."""
        return self.blocks[self.dropped :]

    def parent_hash(self, index: int) -> bytes:
        """What the hash of block `index` starts from, where `hashes` holds those of all blocks before it."""
        return self.hashes[index - 1] if index else self.request.prefix_root

    def end_reason(self) -> EndReason | None:
        """Whether there is nothing to come behind what was drawn last."""
        if self.standing is Standing.COMPLETE:
            return EndReason.CONSTRAINT
        if self.standing is Standing.STUCK:
            return EndReason.DEAD_END
        newest = self.tokens[-1]
        if newest in self.request.stop_ids:
            return EndReason.STOP_TOKEN
        if newest in self.request.eos_ids:
            return EndReason.EOS
        return EndReason.LENGTH if self.num_generated >= self.request.max_tokens else None
