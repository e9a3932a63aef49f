"""The scheduler: which tokens the next step computes.

There is no prefill phase and no decode phase. Each sequence has `total` tokens of which `computed` are in the KV cache,
and a step closes some of that gap within a budget of tokens. Running sequences come first, in order of arrival, so a
sequence that decodes gets its one token each step; what is left of the budget goes to the chunks of prompts, running
before waiting.

Out of blocks, the running sequence that arrived last loses its blocks and waits again at the head of the queue; its
tokens are computed anew later (and found in the prefix cache where they still are).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from qwire import prefix
from worker.engine.block_pool import BlockPool
from worker.engine.plan import Chunk, StepPlan
from worker.engine.sequence import SequenceState


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_step_tokens: int = 512
    """Tokens that one step computes at most."""
    max_running: int = 64
    """Sequences that run at once at most."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A plan, and the sequences its chunks belong to, in the same order."""

    plan: StepPlan
    sequences: list[SequenceState]


class Scheduler:
    """Owns the queue, the running sequences and the block pool. Not thread-safe: the step loop's alone."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self.preemptions = 0
        self._copies: list[tuple[int, int]] = []
        """Blocks to copy at the beginning of the next step."""

    def fits(self, total_tokens: int) -> bool:
        """Whether a sequence of that many tokens could run if it had the pool to itself."""
        return total_tokens <= self.pool.num_blocks * self.pool.block_size

    def add(self, sequence: SequenceState) -> None:
        """Queues a sequence behind those whose wait began before its own: one that moved here keeps its turn."""
        index = len(self.waiting)
        while index and self.waiting[index - 1].queued > sequence.queued:
            index -= 1
        self.waiting.insert(index, sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Forgets a sequence, waiting or running, and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._free(sequence)

    def schedule(self, now: float) -> Scheduled:
        """Plans a step. The plan is empty only if nothing waits or runs."""
        budget = self.limits.max_step_tokens
        chunks: list[Chunk] = []
        scheduled: list[SequenceState] = []
        preempted = False
        # Decodes before chunks of prompts, or one long prompt would take the whole budget from those behind it.
        for sequence in sorted(self.running, key=lambda sequence: sequence.left > 1):
            if budget == 0:
                break
            if sequence not in self.running:  # preempted for one before it
                continue
            count = min(sequence.left, budget)
            while not self._reserve(sequence, count):
                preempted = True
                # The sequence itself is not scheduled yet, so this never picks one that arrived before it.
                victim = next(other for other in reversed(self.running) if other not in scheduled)
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                budget -= count
                chunks.append(_chunk(sequence, count))
                scheduled.append(sequence)
        # A step that preempted has no blocks to spare for newcomers.
        while budget and not preempted and len(self.running) < self.limits.max_running:
            admitted = self._admit(budget, now)
            if admitted is None:
                break
            count = min(admitted.left, budget)
            budget -= count
            chunks.append(_chunk(admitted, count))
            scheduled.append(admitted)
        copies, self._copies = (self._copies, []) if chunks else ([], self._copies)
        return Scheduled(StepPlan(chunks, copies), scheduled)

    def fork(self, parent: SequenceState, child: SequenceState) -> None:
        """Starts a choice that shares its parent's prompt, of which the parent has just computed the last token.

        Full blocks are shared. The last, unless full, is copied, because both will write to it: copy on write, done
        at once. Without a block or a place for it the child waits, and computes again what the cache doesn't hold.
        """
        shared, rest = divmod(parent.computed, self.pool.block_size)
        if len(self.running) == self.limits.max_running or (rest and not self.pool.num_available):
            self.waiting.appendleft(child)
            return
        self.pool.acquire(parent.blocks[:shared])
        child.blocks = parent.blocks[:shared]
        if rest:
            child.blocks += self.pool.allocate(1)
            self._copies.append((parent.blocks[shared], child.blocks[shared]))
        child.computed = parent.computed
        child.published = shared
        self.running.append(child)

    def computed(self, sequence: SequenceState, count: int) -> None:
        """Notes that `count` more tokens of a running sequence are in its blocks, and shares the blocks they filled."""
        sequence.computed += count
        full = sequence.computed // self.pool.block_size
        if sequence.request.use_prefix_cache:
            self._hash(sequence, full)
            for index in range(sequence.published, full):
                self.pool.publish(sequence.blocks[index], sequence.hashes[index])
        else:
            for block in sequence.blocks[sequence.published : full]:
                self.pool.seal(block)
        sequence.published = max(sequence.published, full)

    def waiting_tokens(self) -> int:
        """Tokens of waiting and running sequences that are still to be computed before each draws its next."""
        return sum(sequence.left for sequence in self.waiting) + sum(max(s.left - 1, 0) for s in self.running)

    def _admit(self, budget: int, now: float) -> SequenceState | None:
        """Moves the first sequence that can start from the queue to the running ones, its first chunk reserved."""
        if not self.waiting:
            return None
        computing = self._being_computed()
        suspected = next((other.request for other in self.running if other.unproven), None)
        for sequence in self.waiting:
            if suspected is not None and sequence.unproven and sequence.request is not suspected:
                continue  # should the step fail, it must be plain which of them it was
            cached, next_hash = self._cached_prefix(sequence)
            if next_hash in computing:
                continue  # another sequence computes that block now: wait for it rather than compute it twice
            # All of its prompt must fit at once, or two half-computed prompts could starve each other.
            needed = self._blocks_for(sequence.total + 1) - len(cached)
            if needed > self.pool.num_available - self.pool.num_evictable(cached) and self.running:
                return None
            self.pool.acquire(cached)
            sequence.blocks = cached
            sequence.computed = len(cached) * self.pool.block_size
            sequence.published = len(cached)
            if not self._reserve(sequence, min(sequence.left, budget)):
                self._free(sequence)
                return None
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
                sequence.cached_tokens = min(sequence.computed, len(sequence.request.prompt_ids))
            self.waiting.remove(sequence)
            self.running.append(sequence)
            return sequence
        return None

    def _cached_prefix(self, sequence: SequenceState) -> tuple[list[int], bytes | None]:
        """Cached blocks of a waiting sequence, and the hash of the block after them if that is a full one.

        The last token is always computed, because its logits are wanted.
        """
        if not sequence.request.use_prefix_cache:
            return [], None
        full = (sequence.total - 1) // self.pool.block_size
        self._hash(sequence, full)
        cached = self.pool.lookup(sequence.hashes[:full])
        return cached, sequence.hashes[len(cached)] if len(cached) < full else None

    def _being_computed(self) -> set[bytes | None]:
        """Hashes of the full blocks that running sequences are about to fill with tokens they already have."""
        hashes: set[bytes | None] = set()
        for sequence in self.running:
            if sequence.request.use_prefix_cache and sequence.left > 1:
                full = sequence.total // self.pool.block_size
                self._hash(sequence, full)
                hashes.update(sequence.hashes[sequence.published : full])
        return hashes

    def _hash(self, sequence: SequenceState, count: int) -> None:
        """Extends a sequence's block hashes to its first `count` blocks."""
        size = self.pool.block_size
        while len(sequence.hashes) < count:
            done = len(sequence.hashes)
            parent = sequence.hashes[-1] if done else sequence.request.prefix_root
            sequence.hashes.append(prefix.block_hash(parent, sequence.tokens[done * size : (done + 1) * size]))

    def _reserve(self, sequence: SequenceState, count: int) -> bool:
        """Gives a sequence the blocks for its next `count` tokens, if there are any."""
        missing = self._blocks_for(sequence.computed + count) - len(sequence.blocks)
        if missing > self.pool.num_available:
            return False
        if missing > 0:
            sequence.blocks += self.pool.allocate(missing)
        return True

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        self.waiting.appendleft(sequence)
        sequence.preemptions += 1
        self.preemptions += 1

    def _free(self, sequence: SequenceState) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        sequence.published = 0

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)


def _chunk(sequence: SequenceState, count: int) -> Chunk:
    start = sequence.computed
    draws = []
    if start + count == sequence.total:
        choices = range(sequence.choice, sequence.choice + 1 + sequence.unborn)
        draws = [sequence.draw(choice) for choice in choices]
    return Chunk(sequence.tokens[start : start + count], start, sequence.blocks, draws)
