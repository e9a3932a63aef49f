"""Which tokens blocks begin with: where a prompt leaves the chain of full blocks that the cache holds, a block that
agrees with its next few tokens is worth copying."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


class BlockContents:
    """The leading token ids of blocks, by the hash of what precedes them: of the block before, or the root.

    A block has at most one entry. It stays true while positions are only added behind those it names; whoever hands
    the block out to be written anew forgets it.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        """Parent's hash and token ids by block."""
        self._children: dict[bytes, list[tuple[tuple[int, ...], int]]] = {}
        """Token ids and block by parent's hash; sorted, none empty."""

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def note(self, block: int, parent: bytes, ids: Sequence[int]) -> None:
        """Says that `block` follows `parent` and begins with `ids`, at least one; replaces what was known of it."""
        self.forget(block)
        entry = tuple(ids)
        self._entries[block] = parent, entry
        insort(self._children.setdefault(parent, []), (entry, block))

    def forget(self, block: int) -> None:
        """Drops what is known of a block, if anything is."""
        parent, ids = self._entries.pop(block, (b"", ()))
        if ids:
            children = self._children[parent]
            del children[bisect_left(children, (ids, block))]
            if not children:
                del self._children[parent]

    def longest_match(self, parent: bytes, ids: Sequence[int]) -> tuple[int, int] | None:
        """A block behind `parent` that begins with as many of `ids` as any does, and how many those are; None if no
        block begins with the first of them."""
        children = self._children.get(parent)
        if not children:
            return None
        # In a sorted list, what agrees longest with `ids` is next to their place.
        place = bisect_left(children, (tuple(ids), -1))
        count, block = max((common(entry, ids), block) for entry, block in children[max(place - 1, 0) : place + 1])
        return (block, count) if count else None

    def check(self) -> list[str]:
        """What is wrong with the books, if anything is."""
        listed = [(block, (parent, ids)) for parent, found in self._children.items() for ids, block in found]
        problems = []
        if len(listed) != len(self._entries) or dict(listed) != self._entries:
            problems.append("contents by parent are not those by block")
        if any(not found or found != sorted(found) for found in self._children.values()):
            problems.append("contents are not sorted")
        return problems


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
