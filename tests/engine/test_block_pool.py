"""The block pool's invariant under any sequence of operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.engine.block_contents import common
from worker.engine.block_pool import BlockPool, OutOfBlocks


def block_hash(number: int) -> bytes:
    return number.to_bytes(16, "little")


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share prefixes, grow, publish and go, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 4)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # what a published block holds, by our own book-keeping
        self.begins: dict[int, tuple[bytes, list[int]]] = {}  # what blocks that were described begin with
        self.pool.watch(True)
        self.seen: set[bytes] = set()  # what a watcher thinks is found

    @rule(count=st.integers(0, 14))
    def allocate(self, count: int) -> None:
        available = self.pool.num_available
        if count > available:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            assert self.pool.num_available == available
            return
        table = self.pool.allocate(count)
        assert len(set(table)) == count
        assert not {block for other in self.tables for block in other} & set(table)
        for block in table:
            self.contents.pop(block, None)
            self.begins.pop(block, None)
        self.tables.append(table)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), number=st.integers(0, 8))
    def publish(self, data: st.DataObject, number: int) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        block = data.draw(st.sampled_from(table))
        known = self.pool.lookup([block_hash(number)])
        self.pool.publish(block, block_hash(number))
        if not known and block not in self.contents:
            self.contents[block] = block_hash(number)
        elif block not in self.contents:
            self.begins.pop(block, None)  # the other block is found

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), parent=st.integers(0, 1), ids=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def describe(self, data: st.DataObject, parent: int, ids: list[int]) -> None:
        block = data.draw(st.sampled_from([block for table in self.tables for block in table]))
        known_parent, known = self.begins.get(block, (block_hash(parent), []))
        self.begins[block] = known_parent, (known + ids)[:4]
        self.pool.describe(block, *self.begins[block])

    @rule(parent=st.integers(0, 1), ids=st.lists(st.integers(0, 2), max_size=4))
    def match(self, parent: int, ids: list[int]) -> None:
        counts = {b: common(known, ids) for b, (p, known) in self.begins.items() if p == block_hash(parent)}
        longest = max(counts.values(), default=0)
        found = self.pool.longest_match(block_hash(parent), ids)
        if found is None:
            assert longest == 0
        else:
            block, count = found
            assert counts[block] == count == longest > 0

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), full=st.integers(0, 4))
    def fork(self, data: st.DataObject, full: int) -> None:
        parent = data.draw(st.sampled_from([table for table in self.tables if table]))
        for block in parent[:full]:
            self.pool.seal(block)
        self.pool.acquire(parent[:full])
        self.tables.append(parent[:full])

    @rule(numbers=st.lists(st.integers(0, 8), max_size=4))
    def hit(self, numbers: list[int]) -> None:
        blocks = self.pool.lookup([block_hash(number) for number in numbers])
        for number, block in zip(numbers, blocks, strict=False):
            assert self.contents[block] == block_hash(number)
        before, evictable = self.pool.num_available, self.pool.num_evictable(list(dict.fromkeys(blocks)))
        self.pool.acquire(blocks)
        assert self.pool.num_available == before - evictable
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(index))

    @rule()
    def watch(self) -> None:
        changes = self.pool.take_changes()
        assert not set(changes.stored) & set(changes.removed)
        self.seen |= set(changes.stored)
        self.seen -= set(changes.removed)
        assert self.seen == set(self.pool.hashes())
        assert self.seen == {block_hash(number) for number in range(9) if self.pool.lookup([block_hash(number)])}

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        used = {block for table in self.tables for block in table}
        assert self.pool.num_used == len(used)
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_used == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_unhashed_blocks_are_reused_before_cached_ones_and_tails_before_heads() -> None:
    pool = BlockPool(6, 4)
    chain = pool.allocate(3)
    for number, block in enumerate(chain):
        pool.publish(block, block_hash(number))
    loose = pool.allocate(2)
    pool.release(chain)
    pool.release(loose)
    assert set(pool.allocate(3)).isdisjoint(chain)
    assert pool.allocate(1) == [chain[2]]
    assert pool.lookup([block_hash(0), block_hash(1), block_hash(2)]) == chain[:2]
    assert pool.evictions == 1


def test_blocks_to_copy_from_are_reused_after_unknown_ones_and_the_oldest_first() -> None:
    pool = BlockPool(5, 4)
    blocks = pool.allocate(5)
    pool.publish(blocks[0], block_hash(0))
    for block in (blocks[2], blocks[1]):
        pool.describe(block, block_hash(9), [block])
    for block in (blocks[0], blocks[2], blocks[3], blocks[1], blocks[4]):
        pool.release([block])
    assert pool.allocate(5) == [blocks[4], blocks[3], blocks[2], blocks[1], blocks[0]]
    assert pool.longest_match(block_hash(9), [blocks[1]]) is None


def test_a_hit_keeps_a_block_from_eviction() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(2)
    pool.publish(first, block_hash(1))
    pool.publish(second, block_hash(2))
    pool.release([first])
    pool.release([second])
    pool.acquire(pool.lookup([block_hash(1)]))
    assert pool.allocate(1) == [second]
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)


def test_nothing_is_recorded_while_nobody_watches() -> None:
    pool = BlockPool(2, 4)
    pool.publish(pool.allocate(1)[0], block_hash(1))
    assert not pool.take_changes()
    pool.watch(True)
    pool.publish(pool.allocate(1)[0], block_hash(2))
    pool.watch(False)
    pool.watch(True)
    assert not pool.take_changes()
    assert pool.hashes() == [block_hash(1), block_hash(2)]


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool: pool.release([0]),
        lambda pool: pool.acquire([0]),
        lambda pool: pool.publish(0, block_hash(1)),
        lambda pool: pool.describe(0, block_hash(1), [1]),
        lambda pool: pool.describe(pool.allocate(1)[0], block_hash(1), []),
    ],
)
def test_misuse_is_an_error(misuse: object) -> None:
    with pytest.raises(ValueError, match="block 0"):
        misuse(BlockPool(2, 4))  # type: ignore[operator]


def test_check_notices_a_broken_pool() -> None:
    pool = BlockPool(4, 4)
    (block,) = pool.allocate(1)
    pool._free.append(block)
    with pytest.raises(RuntimeError, match="2 states"):
        pool.check()
    pool = BlockPool(4, 4)
    (block,) = pool.allocate(1)
    pool.describe(block, block_hash(1), [1])
    pool._contents._children.clear()
    with pytest.raises(RuntimeError, match="contents"):
        pool.check()
