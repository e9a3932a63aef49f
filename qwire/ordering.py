"""Whose turn it is: one rule for every queue that requests wait in, a router's and a worker's alike.

Of what waits, the order is: the higher priority; then the tenant that has had the least of that priority; then the
earlier deadline; then the earlier arrival. Nothing waits for ever, whatever else arrives:

- a priority from which nothing was taken for `AGEING_SECONDS` counts one higher, and so on until something is, so it
  gets a turn at least every `(MAX_PRIORITY - priority + 1) * AGEING_SECONDS`, however much of higher priority there is;
- within a priority every tenant's count grows with what it gets, and one that comes new, or comes back, begins with
  the lowest count among those that are there: neither behind them nor with a claim on what it has missed;
- within a tenant a request without a deadline, or with a late one, is ordered as if it were due `PATIENCE_SECONDS`
  after its arrival, so what comes later than that never goes before it.

It is the priority that ages, not the request: a tenant's long queue of old requests doesn't outrank another's new one.
Nothing here reads a clock, and whatever is equal is in order of arrival and then of entry. Not thread-safe.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

MIN_PRIORITY = -10
MAX_PRIORITY = 10
AGEING_SECONDS = 2.0
PATIENCE_SECONDS = 60.0
MAX_IDLE = 1024
"""Tenants with nothing to do whose counts are kept, by priority; of more the one idle longest begins anew."""

Group = tuple[int, bytes]
"""Priority and tenant."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request's turn depends on. Times are seconds on one monotonic clock, the same for all of a queue."""

    tenant: bytes = b""
    priority: int = 0
    """Already capped to what the tenant may have."""
    deadline: float = math.inf
    arrival: float = 0.0
    """When its wait began, here or elsewhere: a request that moves keeps it."""

    @property
    def group(self) -> Group:
        return self.priority, self.tenant

    @property
    def due(self) -> float:
        """The deadline that it is ordered by."""
        return min(self.deadline, self.arrival + PATIENCE_SECONDS)


class Shares:
    """How much of each priority every tenant has had, in whatever unit its owner charges: tokens, seconds."""

    def __init__(self) -> None:
        self._present: dict[Group, int] = {}
        """How many requests are there; none is 0."""
        self._had: dict[Group, float] = {}
        """Of those that are there."""
        self._idle: OrderedDict[Group, float] = OrderedDict()
        """Of those that are not there now, longest idle first."""

    def enter(self, claim: Claim) -> None:
        """One more request is there, waiting or served."""
        group = claim.group
        if group not in self._present:
            lowest = min((had for (priority, _), had in self._had.items() if priority == claim.priority), default=0.0)
            self._had[group] = max(self._idle.pop(group, 0.0), lowest)
            self._present[group] = 0
        self._present[group] += 1

    def leave(self, claim: Claim) -> None:
        """A request that was there no longer is."""
        group = claim.group
        self._present[group] -= 1
        if not self._present[group]:
            del self._present[group]
            self._idle[group] = self._had.pop(group)
            if len(self._idle) > MAX_IDLE:
                self._idle.popitem(last=False)

    def charge(self, claim: Claim, amount: float) -> None:
        """A request's tenant has got `amount` more. While none of its requests is there, nothing is charged."""
        if claim.group in self._had:
            self._had[claim.group] += amount

    def had(self, group: Group) -> float:
        """What a tenant counts as having had; 0 for one that isn't there."""
        return self._had.get(group, 0.0)


_Item = TypeVar("_Item", bound=Hashable)
_Entry = tuple[float, float, int]
"""Due, arrival, number of entry: the order within a group, which never changes."""


class TurnQueue(Generic[_Item]):
    """What waits, in the order of its turns. The caller enters claims into `shares`, and charges them.

    Adding and removing cost O(log n) and a move within a list; an order costs a sort of the groups of priority and
    tenant, and nothing for what isn't looked at.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._groups: dict[Group, list[tuple[_Entry, _Item]]] = {}
        """Sorted, none empty."""
        self._places: dict[_Item, tuple[Group, _Entry]] = {}
        self._since: dict[int, float] = {}
        """By priority: when something was last taken, or when the first that waits came."""
        self._count: dict[int, int] = {}
        """How many wait by priority; none is 0."""
        self._entries = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, item: object) -> bool:
        return item in self._places

    def __iter__(self) -> Iterator[_Item]:
        """All that waits, by no order that means anything."""
        return iter(self._places)

    def add(self, item: _Item, claim: Claim, now: float) -> None:
        """Begins to wait. Raises ValueError for what waits already."""
        if item in self._places:
            raise ValueError("it waits already")
        group = claim.group
        entry = claim.due, claim.arrival, self._entries
        self._entries += 1
        insort(self._groups.setdefault(group, []), (entry, item))
        self._places[item] = group, entry
        self._count[claim.priority] = self._count.get(claim.priority, 0) + 1
        if self._count[claim.priority] == 1:
            self._since[claim.priority] = now

    def remove(self, item: _Item) -> None:
        """Ends a wait in vain. Raises KeyError for what doesn't wait."""
        group, entry = self._places.pop(item)
        waiting = self._groups[group]
        del waiting[bisect_left(waiting, entry, key=lambda pair: pair[0])]
        if not waiting:
            del self._groups[group]
        priority = group[0]
        self._count[priority] -= 1
        if not self._count[priority]:
            del self._count[priority], self._since[priority]

    def take(self, item: _Item, now: float) -> None:
        """Ends a wait because its turn has come: its priority has been served. Raises KeyError as `remove`."""
        priority = self._places[item][0][0]
        self._since[priority] = now
        self.remove(item)

    def level(self, priority: int, now: float) -> int:
        """What a priority counts as, of which something waits: itself, and one more for each time it has aged."""
        return priority + max(0, math.floor((now - self._since[priority]) / AGEING_SECONDS))

    def in_order(self, now: float) -> Iterator[_Item]:
        """What waits, the next turn first. The queue must not change while this is used."""

        if len(self._groups) == 1:
            [waiting] = self._groups.values()
            yield from (item for _, item in waiting)
            return

        def rank(group: Group) -> tuple[int, int, float]:
            priority, _ = group
            return -levels[priority], -priority, self._shares.had(group)

        levels = {priority: self.level(priority, now) for priority in self._since}
        for _, equal in itertools.groupby(sorted(self._groups, key=rank), key=rank):
            for _, item in heapq.merge(*(self._groups[group] for group in equal)):
                yield item

    def first(self, now: float) -> _Item | None:
        """Whose turn is next; None if nothing waits."""
        return next(self.in_order(now), None)
