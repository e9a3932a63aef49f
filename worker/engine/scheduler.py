"""The scheduler: which tokens the next step computes.

There is no prefill phase and no decode phase. Each sequence has `total` tokens of which `computed` are in the KV cache,
and a step closes some of that gap within a budget of tokens. Running sequences come first, in order of arrival, so a
sequence that decodes gets its one token each step; what is left of the budget goes to the chunks of prompts, running
before waiting.

Out of blocks, the running sequence that arrived last loses its blocks and waits again at the head of the queue; its
tokens are computed anew later (and found in the prefix cache where they still are).

A prompt's leading tokens that other sequences have computed under the same root are not computed again. Full blocks are
shared as they are. Where the prompt leaves them within a block, the tokens before that point are copied, at the start
of the step, from a block that begins with them into one of its own. What another sequence is computing is waited for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from qwire.prefix import block_hash
from worker.engine.block_contents import common
from worker.engine.block_pool import BlockPool
from worker.engine.plan import Chunk, StepPlan
from worker.engine.sequence import SequenceState
from worker.engine.speculation import Speculation

WORTH_SHARING = 1 / 4
"""A smaller part of a block is neither copied nor waited for but computed again: a copy is of the whole block, a wait
takes a step, and many chats begin with the same few words."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_step_tokens: int = 512
    """Tokens that one step computes at most."""
    max_running: int = 64
    """Sequences that run at once at most."""
    max_draft_tokens: int = 0
    """Ids that are guessed for a sequence in a step at most."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A plan, and the sequences its chunks belong to, in the same order."""

    plan: StepPlan
    sequences: list[SequenceState]


@dataclass(frozen=True, slots=True)
class _ComputedPrefix:
    blocks: list[int]
    """Full blocks, to be shared."""
    source: int = 0
    """A block that begins with the tokens behind those, `copied` of them; of no meaning if that is 0."""
    copied: int = 0


@dataclass(frozen=True, slots=True)
class _BeingComputed:
    """What running sequences are about to compute of the tokens that they already have."""

    hashes: set[bytes]
    """Of the full blocks."""
    begun: dict[bytes, list[list[int]]]
    """Token ids of the first block of each, by the hash of the block before. Later blocks don't matter: a sequence that
    agrees with those has to wait for the first as a full one."""


class Scheduler:
    """Owns the queue, the running sequences and the block pool. Not thread-safe: the step loop's alone."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self.preemptions = 0
        self.speculation = Speculation(limits.max_draft_tokens)
        self._worth_sharing = max(1, int(WORTH_SHARING * pool.block_size))
        self._copies: list[tuple[int, int]] = []
        """Blocks to copy at the beginning of the next step, one after another. What the pool says that a block holds is
        so once these are done, whoever was given the block since."""

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
        if self.limits.max_draft_tokens and not preempted:
            self._draft(chunks, scheduled, budget)
        copies, self._copies = (self._copies, []) if chunks else ([], self._copies)
        return Scheduled(StepPlan(chunks, copies), scheduled)

    def _draft(self, chunks: list[Chunk], scheduled: list[SequenceState], budget: int) -> None:
        """Adds drafts to a step that computes nothing but the newest token of each sequence: beside those, more rows
        cost little, beside a prompt's as much as its own."""
        if not chunks or any(
            len(chunk.token_ids) > 1 or sequence.unborn for chunk, sequence in zip(chunks, scheduled, strict=True)
        ):
            return
        worth = self.speculation.worth(len(chunks))
        for index, sequence in enumerate(scheduled):
            drafts = sequence.guess(min(budget, self.limits.max_draft_tokens), worth)
            # A block that another sequence may need for its next token is not taken for a guess.
            spare = self.pool.num_available - len(self.running)
            drafts = drafts[: max(0, (len(sequence.blocks) + max(spare, 0)) * self.pool.block_size - sequence.total)]
            if drafts and self._reserve(sequence, 1 + len(drafts)):
                budget -= len(drafts)
                ids = [*chunks[index].token_ids, *drafts]
                chunks[index] = Chunk(ids, chunks[index].start, sequence.blocks, sequence.draws(drafts), len(drafts))

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
        """Notes that `count` more tokens of a running sequence are in its blocks, and shares the blocks they filled.

        Of a block that is not full, what a prompt left in it is shared at once, and what is generated once it is freed:
        not with each token.
        """
        decoded = sequence.left == 1
        sequence.computed += count
        full = sequence.computed // self.pool.block_size
        if sequence.request.use_prefix_cache:
            self._hash(sequence, full)
            for index in range(sequence.published, full):
                self._describe(sequence, index)
                self.pool.publish(sequence.blocks[index], sequence.hashes[index])
            if not decoded:
                self._describe(sequence, full)
        else:
            for block in sequence.blocks[sequence.published : full]:
                self.pool.seal(block)
        sequence.published = max(sequence.published, full)

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

    def _admit(self, budget: int, now: float) -> SequenceState | None:
        """Moves the first sequence that can start from the queue to the running ones, its first chunk reserved."""
        if not self.waiting:
            return None
        being_computed = self._being_computed()
        suspected = next((other.request for other in self.running if other.unproven), None)
        for sequence in self.waiting:
            if suspected is not None and sequence.unproven and sequence.request is not suspected:
                continue  # should the step fail, it must be plain which of them it was
            prefix = self._computed_prefix(sequence, being_computed)
            if prefix is None:
                continue
            # All of its prompt must fit at once, or two half-computed prompts could starve each other.
            needed = self._blocks_for(sequence.total + 1) - len(prefix.blocks)
            if needed > self.pool.num_available - self.pool.num_evictable(prefix.blocks) and self.running:
                return None
            self.pool.acquire(prefix.blocks)
            sequence.blocks = prefix.blocks[:]
            sequence.computed = len(prefix.blocks) * self.pool.block_size
            sequence.published = len(prefix.blocks)
            if not self._reserve(sequence, min(sequence.left, prefix.copied + budget)):
                self._free(sequence)
                return None
            if prefix.copied:
                target = sequence.blocks[len(prefix.blocks)]
                if target != prefix.source:  # it may have been the next to be handed out
                    self._copies.append((prefix.source, target))
                sequence.computed += prefix.copied
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
                sequence.cached_tokens = min(sequence.computed, len(sequence.request.prompt_ids))
            self.waiting.remove(sequence)
            self.running.append(sequence)
            return sequence
        return None

    def _computed_prefix(self, sequence: SequenceState, being_computed: _BeingComputed) -> _ComputedPrefix | None:
        """What others have computed of a waiting sequence's leading tokens; None if it is to wait for more of them.

        The last token is never among them: it is always computed, because its logits are wanted.
        """
        if not sequence.request.use_prefix_cache:
            return _ComputedPrefix([])
        last = sequence.total - 1
        full = last // self.pool.block_size
        self._hash(sequence, full)
        blocks = self.pool.lookup(sequence.hashes[:full])
        count = len(blocks)
        if count < full and sequence.hashes[count] in being_computed.hashes:
            return None
        parent = sequence.parent_hash(count)
        ids = sequence.tokens[count * self.pool.block_size : min((count + 1) * self.pool.block_size, last)]
        source, copied = self.pool.longest_match(parent, ids) or (0, 0)
        if copied < self._worth_sharing:
            copied = 0
        if any(common(ids, others) >= copied + self._worth_sharing for others in being_computed.begun.get(parent, ())):
            return None
        return _ComputedPrefix(blocks, source, copied)

    def _being_computed(self) -> _BeingComputed:
        size = self.pool.block_size
        hashes: set[bytes] = set()
        begun: dict[bytes, list[list[int]]] = {}
        for sequence in self.running:
            if sequence.request.use_prefix_cache and sequence.left > 1:
                full = sequence.total // size
                self._hash(sequence, full)
                hashes.update(sequence.hashes[sequence.published : full])
                first = sequence.computed // size
                ids = sequence.tokens[first * size : (first + 1) * size]
                begun.setdefault(sequence.parent_hash(first), []).append(ids)
        return _BeingComputed(hashes, begun)

    def _describe(self, sequence: SequenceState, index: int) -> None:
        """Tells the pool what the computed positions of a sequence's block hold, if there are any."""
        size = self.pool.block_size
        ids = sequence.tokens[index * size : min((index + 1) * size, sequence.computed)]
        if ids:
            self.pool.describe(sequence.blocks[index], sequence.parent_hash(index), ids)

    def _hash(self, sequence: SequenceState, count: int) -> None:
        """Extends a sequence's block hashes to its first `count` blocks."""
        size = self.pool.block_size
        while len(sequence.hashes) < count:
            done = len(sequence.hashes)
            ids = sequence.tokens[done * size : (done + 1) * size]
            sequence.hashes.append(block_hash(sequence.parent_hash(done), ids))

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
        if sequence.request.use_prefix_cache:
            self._describe(sequence, sequence.computed // self.pool.block_size)
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
