"""The scheduler: which tokens the next step computes.

There is no prefill phase and no decode phase. Each sequence has `total` tokens of which `computed` are in the KV cache,
and a step closes some of that gap. Sequences that decode get their one token each step. Chunks of prompts get what is
left of the step: within `max_step_tokens` always, and while others decode within a target of time, so that a long
prompt doesn't stall them. Which prompt comes first, running or waiting, is `qwire.ordering`'s to say.

Out of blocks, the running sequence that is last in that order loses its blocks and waits again; its tokens are computed
anew later (and found in the prefix cache where they still are). What waits takes nothing away from what runs, unless
its priority is higher than what that counted as when it began. Whatever happens, the running sequence that has waited
longest keeps its blocks: so there always is one that comes to its end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from qwire.ordering import Shares, TurnQueue
from worker.engine.block_pool import BlockPool
from worker.engine.plan import Chunk, StepPlan
from worker.engine.sequence import SequenceState
from worker.engine.sharing import ComputedPrefix, Sharing
from worker.engine.speculation import Speculation
from worker.engine.step_cost import StepCost, StepShape

DECODES_STRETCHED = 2.0
"""Where no target is set, prompts may make a step of decodes so many times as long as it is without them."""
LEAST_TARGET = 0.01
"""Seconds that a step may take in any case, where no target is set."""
LEAST_PROMPT_TOKENS = 8
"""Of a step that has any left to compute, whatever the target: a prompt gets on even where decodes alone exceed it."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_step_tokens: int = 512
    """Tokens that one step computes at most."""
    max_running: int = 64
    """Sequences that run at once at most."""
    max_draft_tokens: int = 0
    """Ids that are guessed for a sequence in a step at most."""
    positions_ahead: int = 0
    """How far the runner computes beyond what it is asked for. Sequences get blocks for it where some are to spare."""
    step_target: float = 0.0
    """Seconds that a step may take while sequences decode; 0 is so many times what they take alone."""
    window: int | None = None
    """How many positions a query reads in any layer, its own included; None where a layer reads all."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A plan, and the sequences its chunks belong to, in the same order."""

    plan: StepPlan
    sequences: list[SequenceState]


class _Step:
    """A plan in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: list[Chunk] = []
        self.sequences: list[SequenceState] = []
        self.decodes = 0
        """Chunks that were added before those of prompts."""
        self.preempted = False

    def add(self, sequence: SequenceState, count: int) -> None:
        self.budget -= count
        self.chunks.append(_chunk(sequence, count))
        self.sequences.append(sequence)


class Scheduler:
    """Owns the queue, the running sequences and the block pool. Not thread-safe: the step loop's alone."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.cost = StepCost()
        self.shares = Shares()
        self.waiting: TurnQueue[SequenceState] = TurnQueue(self.shares)
        self.running: list[SequenceState] = []
        self.preemptions = 0
        self.speculation = Speculation(limits.max_draft_tokens)
        self.prompt_tokens = 0
        """Of sequences that have begun to run; those of them that were found in the prefix cache are counted below."""
        self.cached_tokens = 0
        self._now = 0.0
        """When the newest step was planned."""
        self._sharing = Sharing(pool, limits.window)
        self._copies: list[tuple[int, int]] = []
        """Blocks to copy at the beginning of the next step, one after another. What the pool says that a block holds is
        so once these are done, whoever was given the block since."""

    def fits(self, total_tokens: int) -> bool:
        """Whether a sequence of that many tokens could run if it had the pool to itself."""
        return total_tokens <= self.pool.num_blocks * self.pool.block_size

    def add(self, sequence: SequenceState, now: float) -> None:
        """Queues a sequence: one that moved here keeps its turn."""
        self.shares.enter(sequence.claim)
        self.waiting.add(sequence, sequence.claim, now)

    def remove(self, sequence: SequenceState) -> None:
        """Forgets a sequence, waiting or running, and frees its blocks."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self.shares.leave(sequence.claim)
        self._free(sequence)

    def schedule(self, now: float) -> Scheduled:
        """Plans a step. The plan is empty only if nothing waits or runs."""
        self._now = now
        self._make_room()
        step = _Step(self.limits.max_step_tokens)
        running = sorted(self.running, key=_rank(self.shares))
        for sequence in running:
            if sequence.left == 1 and step.budget and sequence in self.running:  # not preempted for one before it
                self._continue(step, sequence, 1)
        step.decodes = len(step.chunks)
        self._add_prompts(step, deque(sequence for sequence in running if sequence.left > 1))
        if self.limits.max_draft_tokens and not step.preempted:
            self._draft(step)
        copies, self._copies = (self._copies, []) if step.chunks else ([], self._copies)
        return Scheduled(StepPlan(step.chunks, copies), step.sequences)

    def _draft(self, step: _Step) -> None:
        """Adds drafts to a step that computes nothing but the newest token of each sequence: beside those, more rows
        cost little, beside a prompt's as much as its own."""
        if not step.chunks or len(step.chunks) != step.decodes or any(sequence.unborn for sequence in step.sequences):
            return
        worth = self.speculation.worth(len(step.chunks))
        for index, sequence in enumerate(step.sequences):
            drafts = sequence.guess(min(step.budget, self.limits.max_draft_tokens), worth)
            # A block that another sequence may need for its next token is not taken for a guess.
            spare = self.pool.num_available - len(self.running)
            drafts = drafts[: max(0, (len(sequence.blocks) + max(spare, 0)) * self.pool.block_size - sequence.total)]
            if drafts and self._reserve(sequence, 1 + len(drafts)):
                step.budget -= len(drafts)
                chunk = step.chunks[index]
                ids = [*chunk.token_ids, *drafts]
                step.chunks[index] = Chunk(ids, chunk.start, sequence.blocks, sequence.draws(drafts), len(drafts))

    def fork(self, parent: SequenceState, child: SequenceState) -> None:
        """Starts a choice that shares its parent's prompt, of which the parent has just computed the last token.

        Full blocks are shared. The last, unless full, is copied, because both will write to it: copy on write, done
        at once. Without a block or a place for it the child waits, and computes again what the cache doesn't hold.
        """
        shared, rest = divmod(parent.computed, self.pool.block_size)
        self.shares.enter(child.claim)
        if len(self.running) == self.limits.max_running or (rest and not self.pool.num_available):
            self.waiting.add(child, child.claim, self._now)
            return
        self.pool.acquire(parent.blocks[parent.dropped : shared])
        child.blocks, child.dropped = parent.blocks[:shared], parent.dropped
        if rest:
            child.blocks += self.pool.allocate(1)
            self._copies.append((parent.blocks[shared], child.blocks[shared]))
        child.computed = parent.computed
        child.published = shared
        child.level = parent.level
        self.running.append(child)

    def computed(self, sequence: SequenceState, count: int) -> None:
        """Notes that `count` more tokens of a running sequence are in its blocks, and shares the blocks they filled."""
        decoded = sequence.left == 1
        sequence.computed += count
        # A token that is drawn costs about as much again: it is a row of a step's own.
        self.shares.charge(sequence.claim, count + (sequence.left == 0))
        self._sharing.publish(sequence, sequence.computed // self.pool.block_size, decoded=decoded)
        behind = self._sharing.behind(sequence.computed)
        if behind > sequence.dropped:
            # Their places in the table stay: kernels may look at them, though at nothing in them that counts.
            self.pool.release(sequence.blocks[sequence.dropped : behind])
            sequence.dropped = behind

    def verified(self, sequence: SequenceState, guessed: int, kept: int) -> None:
        """Notes how a sequence's drafts fared, and takes back what was reserved for those that were wrong."""
        self.speculation.verified(sequence.guesses, guessed, kept)
        needed = self._blocks_for(sequence.total)
        if sequence.blocks[needed:]:
            self.pool.release(sequence.blocks[needed:])
            del sequence.blocks[needed:]

    def waiting_tokens(self) -> int:
        """Tokens of waiting and running sequences that are still to be computed before each draws its next."""
        return sum(sequence.left for sequence in self.waiting) + sum(max(s.left - 1, 0) for s in self.running)

    def check(self) -> None:
        """Verifies the books, the pool's too; raises RuntimeError where they are broken. O(blocks and sequences)."""
        self.pool.check()
        problems = []
        if len(self.running) > self.limits.max_running:
            problems.append(f"{len(self.running)} sequences run")
        if any(sequence in self.waiting for sequence in self.running):
            problems.append("a sequence waits and runs")
        if any(sequence.blocks or sequence.computed for sequence in self.waiting):
            problems.append("a sequence that waits has blocks")
        for sequence in self.running:
            if not sequence.published <= sequence.computed // self.pool.block_size <= len(sequence.blocks):
                problems.append("a sequence's counts don't agree")
        held = {block for sequence in self.running for block in sequence.held}
        if len(held) != self.pool.num_used:
            problems.append(f"{self.pool.num_used} blocks are used, and sequences hold {len(held)}")
        if problems:
            raise RuntimeError("scheduler: " + "; ".join(problems))

    def _add_prompts(self, step: _Step, prompts: deque[SequenceState]) -> None:
        """Adds chunks of prompts to a step: of those that run, given in order, and of those that wait."""
        seconds = self._prompt_seconds(step)
        rank = _rank(self.shares)
        room = True
        while step.budget:
            while prompts and prompts[0] not in self.running:  # preempted for one before it
                prompts.popleft()
            # A step that preempted has no blocks to spare for newcomers.
            room = room and not step.preempted and len(self.running) < self.limits.max_running
            newcomer = self._newcomer() if room else None
            sequence = newcomer[0] if newcomer is not None else None
            if sequence is None or (prompts and rank(prompts[0]) <= self._rank_waiting(sequence)):
                newcomer = None
                if not prompts:
                    return
                sequence = prompts.popleft()
            if (most := self._chunk_tokens(step, sequence, newcomer, seconds)) == 0:
                return
            if newcomer is None:
                self._continue(step, sequence, min(sequence.left, most))
            elif self._admit(*newcomer, most):
                step.add(sequence, min(sequence.left, most))
            else:
                room = False
                continue
            if step.sequences and step.sequences[-1] is sequence:
                seconds -= self.cost.prompt_seconds(step.chunks[-1].start, len(step.chunks[-1].token_ids))

    def _prompt_seconds(self, step: _Step) -> float:
        """How much longer the decodes' step may get by chunks of prompts; infinite where nothing decodes."""
        if not step.chunks:
            return math.inf
        alone = self.cost.seconds(StepShape.of(step.chunks))
        target = self.limits.step_target or max(DECODES_STRETCHED * alone, LEAST_TARGET)
        return target - alone

    def _chunk_tokens(
        self,
        step: _Step,
        sequence: SequenceState,
        newcomer: tuple[SequenceState, ComputedPrefix] | None,
        seconds: float,
    ) -> int:
        """How many tokens of a prompt a step may compute at most; 0 if the step is full."""
        if seconds == math.inf:
            return step.budget
        start = sequence.computed
        if newcomer is not None:
            start = len(newcomer[1].blocks) * self.pool.block_size + newcomer[1].copied
        within = self.cost.prompt_tokens(start, seconds)
        if len(step.sequences) == step.decodes:
            within = max(within, LEAST_PROMPT_TOKENS)
        return min(step.budget, within)

    def _continue(self, step: _Step, sequence: SequenceState, count: int) -> None:
        """Adds the next tokens of a running sequence to a step; without blocks for them, whatever is last in order
        loses its own, which may be the sequence itself."""
        while not self._reserve(sequence, count):
            oldest = self._oldest()
            victims = [other for other in self.running if other is not oldest and other not in step.sequences]
            if not victims:
                return  # what it waits for is in this step, and comes to its end
            # Of equals the one that began last.
            victim = max(reversed(victims), key=_rank(self.shares))
            step.preempted = True
            self._preempt(victim)
            if victim is sequence:
                return
        step.add(sequence, count)

    def _make_room(self) -> None:
        """Preempts running work of lower priority for the one that waits first, where that lets it start."""
        first = self.waiting.first(self._now)
        if first is None or all(first.request.priority <= sequence.level for sequence in self.running):
            return
        if (newcomer := self._newcomer()) is None:
            return
        sequence, prefix = newcomer
        oldest = self._oldest()
        lower = [s for s in self.running if s.level < sequence.request.priority and s is not oldest]
        lower.sort(key=_rank(self.shares))
        if self._missing(sequence, prefix) <= sum(len(victim.held) for victim in lower):
            while lower and (len(self.running) == self.limits.max_running or self._missing(sequence, prefix) > 0):
                self._preempt(lower.pop())

    def _newcomer(self) -> tuple[SequenceState, ComputedPrefix] | None:
        """The first that waits and may start, and what is computed of it."""
        if not self.waiting:
            return None
        being_computed = self._sharing.being_computed(self.running)
        suspected = next((other.request for other in self.running if other.unproven), None)
        for sequence in self.waiting.in_order(self._now):
            if suspected is not None and sequence.unproven and sequence.request is not suspected:
                continue  # should the step fail, it must be plain which of them it was
            prefix = self._sharing.computed_prefix(sequence, being_computed)
            if prefix is not None:
                return sequence, prefix
        return None

    def _missing(self, sequence: SequenceState, prefix: ComputedPrefix) -> int:
        """How many blocks more there would have to be for a newcomer. All of its prompt must fit beside all of those
        that run, or half-computed prompts could starve each other."""
        shared = prefix.blocks[prefix.dropped :]
        needed = self._blocks_at_once(sequence) - len(shared)
        promised = sum(max(0, self._blocks_at_once(other) - len(other.held)) for other in self.running)
        return needed + promised - (self.pool.num_available - self.pool.num_evictable(shared))

    def _admit(self, sequence: SequenceState, prefix: ComputedPrefix, most: int) -> bool:
        """Starts a sequence, its first chunk of at most so many tokens reserved, if there is room for it."""
        if self.running and self._missing(sequence, prefix) > 0:
            return False
        self.pool.acquire(prefix.blocks[prefix.dropped :])
        sequence.blocks, sequence.dropped = prefix.blocks[:], prefix.dropped
        sequence.computed = len(prefix.blocks) * self.pool.block_size
        sequence.published = len(prefix.blocks)
        if not self._reserve(sequence, min(sequence.left, prefix.copied + most)):
            self._free(sequence)
            return False
        if prefix.copied:
            target = sequence.blocks[len(prefix.blocks)]
            if target != prefix.source:  # it may have been the next to be handed out
                self._copies.append((prefix.source, target))
            sequence.computed += prefix.copied
        if sequence.first_scheduled is None:
            sequence.first_scheduled = self._now
            sequence.cached_tokens = min(sequence.computed, len(sequence.request.prompt_ids))
            self.prompt_tokens += len(sequence.request.prompt_ids)
            self.cached_tokens += sequence.cached_tokens
        sequence.level = self.waiting.level(sequence.request.priority, self._now)
        self.waiting.take(sequence, self._now)
        self.running.append(sequence)
        return True

    def _oldest(self) -> SequenceState:
        """The running sequence that has waited longest, of equals the one that began first: it is never preempted."""
        return min(self.running, key=lambda sequence: sequence.claim.arrival)

    def _rank_waiting(self, sequence: SequenceState) -> tuple[float, ...]:
        level = self.waiting.level(sequence.request.priority, self._now)
        return _rank(self.shares, level)(sequence)

    def _reserve(self, sequence: SequenceState, count: int) -> bool:
        """Gives a sequence the blocks for its next `count` tokens, if there are any."""
        missing = self._blocks_for(sequence.computed + count) - len(sequence.blocks)
        if missing > self.pool.num_available:
            return False
        early = self._blocks_for(sequence.computed + count + self.limits.positions_ahead) - len(sequence.blocks)
        # Not a block that another running sequence may need for what it was asked for.
        if early + len(self.running) <= self.pool.num_available:
            missing = early
        if missing > 0:
            sequence.blocks += self.pool.allocate(missing)
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        self.waiting.add(sequence, sequence.claim, self._now)
        self.preemptions += 1

    def _free(self, sequence: SequenceState) -> None:
        if sequence.request.use_prefix_cache and sequence.blocks:
            self._sharing.describe(sequence, sequence.computed // self.pool.block_size)
        self.pool.release(sequence.held)
        sequence.blocks, sequence.dropped = [], 0
        sequence.computed = 0
        sequence.published = 0

    def _blocks_at_once(self, sequence: SequenceState) -> int:
        """How many blocks a sequence holds at most until it draws its next token."""
        needed = self._blocks_for(sequence.total + 1)
        if self.limits.window is None:
            return needed
        return min(needed, self._blocks_for(self.limits.window + self.limits.max_step_tokens) + 1)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)


def _rank(shares: Shares, level: int | None = None) -> Callable[[SequenceState], tuple[float, ...]]:
    """The order of `qwire.ordering` between sequences that run, or wait at a level: lower is first."""

    def rank(sequence: SequenceState) -> tuple[float, ...]:
        claim = sequence.claim
        counted = sequence.level if level is None else level
        return -counted, -claim.priority, shares.had(claim.group), claim.due, claim.arrival

    return rank


def _chunk(sequence: SequenceState, count: int) -> Chunk:
    start = sequence.computed
    draws = []
    if start + count == sequence.total:
        choices = range(sequence.choice, sequence.choice + 1 + sequence.unborn)
        draws = [sequence.draw(choice) for choice in choices]
    return Chunk(
        sequence.tokens[start : start + count],
        start,
        sequence.blocks,
        draws,
        scored=sequence.to_score(count),
        scored_top=sequence.request.prompt_logprobs or 0,
    )
