"""What of a sequence's leading tokens others have computed: full blocks to share, part of a block to copy.

A prompt's leading tokens that other sequences have computed under the same root are not computed again. Full blocks are
shared as they are. Where the prompt leaves them within a block, the tokens before that point are copied, at the start
of the step, from a block that begins with them into one of its own. What another sequence is computing is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qwire.prefix import block_hash
from worker.engine.block_contents import common
from worker.engine.block_pool import BlockPool
from worker.engine.sequence import SequenceState

WORTH_SHARING = 1 / 4
"""A smaller part of a block is neither copied nor waited for but computed again: a copy is of the whole block, a wait
takes a step, and many chats begin with the same few words."""


@dataclass(frozen=True, slots=True)
class ComputedPrefix:
    blocks: list[int]
    """Full blocks, to be shared."""
    dropped: int = 0
    """How many of them, the first ones, are not needed, because no window reaches back to them: no blocks in truth."""
    source: int = 0
    """A block that begins with the tokens behind those, `copied` of them; of no meaning if that is 0."""
    copied: int = 0


@dataclass(frozen=True, slots=True)
class BeingComputed:
    """What running sequences are about to compute of the tokens that they already have."""

    hashes: set[bytes]
    """Of the full blocks."""
    begun: dict[bytes, list[list[int]]]
    """Token ids of the first block of each, by the hash of the block before. Later blocks don't matter: a sequence that
    agrees with those has to wait for the first as a full one."""


class Sharing:
    """Finds what sequences can share in a pool, and tells the pool what they have computed.

    Args:
        window: how many positions a query reads, its own included; None for all before it.
    """

    def __init__(self, pool: BlockPool, window: int | None = None) -> None:
        self._pool = pool
        self._window = window
        self._worth_sharing = max(1, int(WORTH_SHARING * pool.block_size))

    def computed_prefix(self, sequence: SequenceState, being_computed: BeingComputed) -> ComputedPrefix | None:
        """What others have computed of a waiting sequence's leading tokens; None if it is to wait for more of them.

        The last token is never among them: it is always computed, because its logits are wanted.
        """
        if not sequence.request.use_prefix_cache or sequence.scores_prompt:
            return ComputedPrefix([])
        last = sequence.total - 1
        full = last // self._pool.block_size
        self._hash(sequence, full)
        blocks, dropped = self._full_blocks(sequence.hashes[:full])
        count = len(blocks)
        if count < full and sequence.hashes[count] in being_computed.hashes:
            return None
        parent = sequence.parent_hash(count)
        ids = sequence.tokens[count * self._pool.block_size : min((count + 1) * self._pool.block_size, last)]
        source, copied = self._pool.longest_match(parent, ids) or (0, 0)
        if copied < self._worth_sharing:
            copied = 0
        if any(common(ids, others) >= copied + self._worth_sharing for others in being_computed.begun.get(parent, ())):
            return None
        return ComputedPrefix(blocks, dropped, source, copied)

    def behind(self, computed: int) -> int:
        """How many leading blocks no query from position `computed` on reads."""
        return max(0, computed - self._window + 1) // self._pool.block_size if self._window is not None else 0

    def _full_blocks(self, hashes: list[bytes]) -> tuple[list[int], int]:
        """The blocks of the longest prefix that need not be computed, and how many of the first are not needed."""
        if self._window is None:
            return self._pool.lookup(hashes), 0
        found = [self._pool.find(block_hash) for block_hash in hashes]
        best = run = 0
        for count, block in enumerate(found, 1):
            run = run + 1 if block is not None else 0
            if run >= count - self.behind(count * self._pool.block_size):
                best = count
        dropped = self.behind(best * self._pool.block_size)
        return [0 if block is None else block for block in found[:best]], dropped

    def being_computed(self, running: Iterable[SequenceState]) -> BeingComputed:
        size = self._pool.block_size
        hashes: set[bytes] = set()
        begun: dict[bytes, list[list[int]]] = {}
        for sequence in running:
            if sequence.request.use_prefix_cache and sequence.left > 1:
                full = sequence.total // size
                self._hash(sequence, full)
                hashes.update(sequence.hashes[sequence.published : full])
                first = sequence.computed // size
                ids = sequence.tokens[first * size : (first + 1) * size]
                begun.setdefault(sequence.parent_hash(first), []).append(ids)
        return BeingComputed(hashes, begun)

    def publish(self, sequence: SequenceState, full: int, *, decoded: bool) -> None:
        """Shares a running sequence's first `full` blocks, which are computed.

        Of a block that is not full, what a prompt left in it is shared at once, and what is generated once it is freed:
        not with each token.
        """
        if sequence.request.use_prefix_cache:
            self._hash(sequence, full)
            for index in range(sequence.published, full):
                self.describe(sequence, index)
                self._pool.publish(sequence.blocks[index], sequence.hashes[index])
            if not decoded:
                self.describe(sequence, full)
        else:
            for block in sequence.blocks[sequence.published : full]:
                self._pool.seal(block)
        sequence.published = max(sequence.published, full)

    def describe(self, sequence: SequenceState, index: int) -> None:
        """Tells the pool what the computed positions of a sequence's block hold, if there are any."""
        size = self._pool.block_size
        ids = sequence.tokens[index * size : min((index + 1) * size, sequence.computed)]
        if ids:
            self._pool.describe(sequence.blocks[index], sequence.parent_hash(index), ids)

    def _hash(self, sequence: SequenceState, count: int) -> None:
        """Extends a sequence's block hashes to its first `count` blocks."""
        size = self._pool.block_size
        while len(sequence.hashes) < count:
            done = len(sequence.hashes)
            ids = sequence.tokens[done * size : (done + 1) * size]
            sequence.hashes.append(block_hash(sequence.parent_hash(done), ids))
