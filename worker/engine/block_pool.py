"""The block pool: which KV blocks are free, used, or kept because their content may be wanted again.

Invariant: every block is in exactly one of three states.

- used: at least one sequence refers to it (`refs > 0`);
- cached: no sequence does, but its hash is known, so a new sequence with the same prefix can take it over as it is;
- free: neither.

A block is full once all of its positions are computed, and is not written again while anyone refers to it. Only full
blocks are ever shared, so no writable block is. What the first positions of any block hold may be known too, full or
not, used, cached or free: a sequence that begins a block with the same tokens copies them (`longest_match`).

All operations are O(1) a block; with contents, O(log n) in the blocks behind one parent, and a move of their list.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from worker.engine.block_contents import BlockContents


class OutOfBlocks(Exception):
    """There are not as many free and cached blocks as were asked for."""


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """What `lookup` finds now and didn't before, and the other way around. No hash is in both."""

    stored: list[bytes]
    removed: list[bytes]

    def __bool__(self) -> bool:
        return bool(self.stored or self.removed)


class BlockPool:
    """Hands out blocks 0 to `num_blocks` - 1 of `block_size` positions each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and positions: {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.evictions = 0
        """Cached blocks that were handed out anew."""
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._full = [False] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        # Of use to copy from, until reused.
        self._contents = BlockContents()
        # Taken from the right. A block of unknown contents is put there: the one freed last is reused first, its memory
        # is the likeliest to be in the CPU's caches. One of known contents is put to the left.
        self._free = deque(reversed(range(num_blocks)))
        # Least recently released first: the order of eviction.
        self._cached: OrderedDict[int, None] = OrderedDict()
        # Hashes that changed since last taken, and whether they are found now. None while nobody watches.
        self._changes: dict[bytes, bool] | None = None

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can hand out now."""
        return len(self._free) + len(self._cached)

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of a chain of block hashes. Takes no reference."""
        blocks = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def find(self, block_hash: bytes) -> int | None:
        """The block that is known under a hash, whether or not those before it are. Takes no reference."""
        return self._by_hash.get(block_hash)

    def longest_match(self, parent: bytes, ids: Sequence[int]) -> tuple[int, int] | None:
        """The block behind `parent` (a block's hash, or the root) that begins with the most of `ids`, and how many
        those are; None if none begins with the first.

        Takes no reference: the block may be handed out before it is read. What it holds is still there when the next
        step copies blocks, which is before that step writes any.
        """
        return self._contents.longest_match(parent, ids)

    def num_evictable(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` `num_available` counts: taking them makes it smaller by that."""
        return sum(1 for block in blocks if self._refs[block] == 0)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each of some full blocks, used or cached."""
        for block in blocks:
            if not self._full[block]:
                raise ValueError(f"block {block} is not full and can't be shared")
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks with one reference each, no hash, unknown contents; all or none. Raises OutOfBlocks."""
        if count > self.num_available:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_available} available")
        return [self._take() for _ in range(count)]

    def seal(self, block: int) -> None:
        """Says that a used block is full: from now on it is only read."""
        if self._refs[block] == 0:
            raise ValueError(f"block {block} is not used")
        self._full[block] = True

    def describe(self, block: int, parent: bytes, ids: Sequence[int]) -> None:
        """Says what a used block holds in its first positions, behind `parent`, for `longest_match` to find: at least
        one id, and at least those that were said of it before."""
        if self._refs[block] == 0:
            raise ValueError(f"block {block} is not used")
        if not 0 < len(ids) <= self.block_size:
            raise ValueError(f"block {block} holds 1 to {self.block_size} ids, not {len(ids)}")
        self._contents.note(block, parent, ids)

    def publish(self, block: int, block_hash: bytes) -> None:
        """Seals a block, and has `lookup` find it under the hash of its content.

        Where another block is found under the hash already, this one isn't: block tables are never rewritten.
        """
        self.seal(block)
        if self._hashes[block] is not None:
            return
        if block_hash in self._by_hash:
            self._contents.forget(block)  # the other one is found for all that this one holds
            return
        self._hashes[block] = block_hash
        self._by_hash[block_hash] = block
        self._note(block_hash, found=True)

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference of each block of one sequence, given in the order of its block table.

        Blocks without a hash are reused first, those of unknown contents before others. Of the hashed ones the tail of
        the chain goes first: a prefix is of use without its tail, a tail without its prefix is not.
        """
        for block in reversed(blocks):
            if self._refs[block] == 0:
                raise ValueError(f"block {block} is released more often than taken")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._hashes[block] is not None:
                    self._cached[block] = None
                elif block in self._contents:
                    self._free.appendleft(block)
                else:
                    self._free.append(block)

    def watch(self, watched: bool) -> None:
        """Begins or ends the record of changes. While it runs, `take_changes` is to be called after each step: what it
        holds is bounded by the blocks that were published and taken since."""
        if not watched:
            self._changes = None
        elif self._changes is None:
            self._changes = {}

    def take_changes(self) -> CacheChanges:
        """What changed since last asked; nothing while nobody watches."""
        stored: list[bytes] = []
        removed: list[bytes] = []
        if self._changes:
            for block_hash, found in self._changes.items():
                (stored if found else removed).append(block_hash)
            self._changes = {}
        return CacheChanges(stored, removed)

    def hashes(self) -> list[bytes]:
        """Every hash that `lookup` finds."""
        return list(self._by_hash)

    def check(self) -> None:
        """Verifies the invariant over the whole pool; raises RuntimeError where it is broken. O(num_blocks)."""
        free, cached = set(self._free), set(self._cached)
        problems = self._contents.check()
        if len(free) != len(self._free):
            problems.append("a block is free twice")
        for block, (refs, block_hash) in enumerate(zip(self._refs, self._hashes, strict=True)):
            states = (block in free) + (block in cached) + (refs > 0)
            if refs < 0 or states != 1:
                problems.append(f"block {block} is in {states} states with {refs} references")
            if block in free and block_hash is not None:
                problems.append(f"block {block} is free and hashed")
            if block in cached and block_hash is None:
                problems.append(f"block {block} is cached without a hash")
            if refs > 1 and not self._full[block]:
                problems.append(f"block {block} is shared and writable")
            if block_hash is not None and not self._full[block]:
                problems.append(f"block {block} is hashed and writable")
            if block_hash is not None and self._by_hash.get(block_hash) != block:
                problems.append(f"block {block} is not found under its hash")
        if len(self._by_hash) != sum(1 for block_hash in self._hashes if block_hash is not None):
            problems.append("the index holds hashes of no block")
        if problems:
            raise RuntimeError("block pool: " + "; ".join(problems))

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self.evictions += 1
            block_hash = self._hashes[block]
            if block_hash is not None:
                del self._by_hash[block_hash]
                self._hashes[block] = None
                self._note(block_hash, found=False)
        self._contents.forget(block)
        self._refs[block] = 1
        self._full[block] = False
        return block

    def _note(self, block_hash: bytes, *, found: bool) -> None:
        # Only the last of several changes counts, so the order between hashes doesn't.
        if self._changes is not None:
            self._changes[block_hash] = found
