"""Who may wait at a router, and whose turn it is.

The queue of a fleet is here: a worker is sent what it runs and a little more, and the rest waits in the order of
`qwire.ordering`. Whether a request may wait is decided at once, on counts and bytes, before anything is computed for
it, in a time that doesn't depend on how many wait. From then on it holds a ticket until its stream ends, however that
is; a request that moves to another worker keeps it, and so its place among those that run.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, Self

import grpc

from qwire.errors import QwireError, Reason
from qwire.ordering import MAX_PRIORITY, MIN_PRIORITY, Claim, Shares, TurnQueue
from qwire.v1 import worker_pb2 as pb
from router.waits import Pace, Share

RETRY_SECONDS = (0.5, 30.0)
"""The shortest and the longest time after which a refused request is told to come again."""
RETRY_JITTER = 0.2
"""By which part of it that time differs between those who are refused together."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a tenant, or of all of them together. Tokens are those of prompts."""

    queued: int
    queued_tokens: int
    running: int
    running_tokens: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request needs of a worker."""

    model: str
    needs: frozenset[pb.Feature.ValueType] = frozenset()
    numerics_id: str = ""
    """Empty for any."""


class Room(Protocol):
    """What admission asks of a fleet."""

    def room(self, wanted: Wanted) -> int | None:
        """Requests that its ready workers would still take; None where none is ready."""

    def prefill_seconds(self, model: str, tokens: float) -> float:
        """How long its ready workers take to compute what they have and so many prompt tokens more; 0 if unknown."""


@dataclass(slots=True)
class _Count:
    requests: int = 0
    tokens: int = 0

    def add(self, tokens: int) -> None:
        self.requests += 1
        self.tokens += tokens

    def take(self, tokens: int) -> None:
        self.requests -= 1
        self.tokens -= tokens


@dataclass(slots=True)
class _Use:
    """Of a tenant, or of all."""

    limits: Limits
    queued: _Count = field(default_factory=_Count)
    running: _Count = field(default_factory=_Count)

    @property
    def may_run(self) -> int:
        """How many more may run."""
        return self.limits.running - self.running.requests

    def takes(self, tokens: int) -> bool:
        """Whether a request of so many tokens may run. One that is larger than the limit runs by itself."""
        running = self.running
        return self.may_run > 0 and (not running.requests or running.tokens + tokens <= self.limits.running_tokens)

    @property
    def empty(self) -> bool:
        return not (self.queued.requests or self.running.requests)


class _Lane:
    """The queue of one model."""

    def __init__(self) -> None:
        self.shares = Shares()
        self.queue: TurnQueue[Ticket] = TurnQueue(self.shares)
        self.pace = Pace()
        self.uncached = Share(1.0)
        """The part of prompts that workers had to compute."""
        self.granted = 0
        """Tickets whose turn has come and that no worker was sent yet."""
        self.waiting = dict.fromkeys(range(MIN_PRIORITY, MAX_PRIORITY + 1), 0)
        """Prompt tokens that wait, by priority."""
        self.waiting_requests = dict.fromkeys(range(MIN_PRIORITY, MAX_PRIORITY + 1), 0)


class Ticket:
    """One request's place, from its arrival until its stream's end: a context manager, to be entered once."""

    def __init__(self, admission: Admission, tenant: str, claim: Claim, tokens: int) -> None:
        self.tenant = tenant
        self.claim = claim
        self.tokens = tokens
        """Of its prompt: at first as guessed from its bytes."""
        self.wanted: Wanted | None = None
        """What it waits for, or waited for."""
        self.running = False
        """Whether it has had its turn."""
        self.granted = False
        """Whether it has, and no worker was sent it yet."""
        self.turn: asyncio.Future[None] | None = None
        """While it waits."""
        self._admission = admission

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._admission._leave(self)

    def count(self, tokens: int) -> None:
        """Says how many tokens its prompt has."""
        self._admission._recount(self, tokens)

    async def wait(self, wanted: Wanted) -> None:
        """Waits for its turn, unless it has had it. Raises QwireError DEADLINE_EXCEEDED."""
        if not self.running:
            await self._admission._wait(self, wanted)

    def placed(self, uncached_tokens: int) -> None:
        """A worker was sent it, with so many tokens to compute."""
        self._admission._placed(self, uncached_tokens)

    def put_back(self) -> None:
        """There was no room for it after all: `wait` waits again, in its old place."""
        self._admission._put_back(self)

    def charge(self, tokens: int) -> None:
        """Its tenant has got so many tokens."""
        self._admission._charge(self, tokens)


class Admission:
    """The queue of a router, its limits, and what they are measured by. Lives on the event loop.

    Args:
        limits: of all requests together.
        tenant_limits: of each tenant's.
    """

    def __init__(self, fleet: Room, limits: Limits, tenant_limits: Limits, clock: Callable[[], float]) -> None:
        self.refused = 0
        """Requests refused since the start."""
        self._fleet = fleet
        self._tenant_limits = tenant_limits
        self._clock = clock
        self._all = _Use(limits)
        self._tenants: dict[str, _Use] = {}
        """Of those that have a ticket."""
        self._lanes: dict[str, _Lane] = {}
        """By model: as many as workers ever served."""
        self._serving: asyncio.Handle | None = None

    @property
    def queued(self) -> int:
        """Requests that have had no turn yet."""
        return self._all.queued.requests

    @property
    def queued_tokens(self) -> int:
        return self._all.queued.tokens

    @property
    def running(self) -> int:
        return self._all.running.requests

    def refuse(self, tenant: str, model: str) -> QwireError | None:
        """How any request for a model is refused now, whatever it holds; None where that depends on it.

        What it returns is to be told to the caller: it counts as refused.
        """
        if self._all.queued.requests < min(self._all.limits.queued, self._tenant_limits.queued):
            return None
        use = self._tenants.get(tenant) or _Use(self._tenant_limits)
        if (error := self._over_limit(use, 1, 0, model)) is not None:
            self.refused += 1
        return error

    def enter(self, tenant: str, claim: Claim, tokens: int, model: str) -> Ticket:
        """Takes in a request, which leaves with its ticket, or refuses it.

        Args:
            tokens: of its prompt, or a guess.
            model: what it will want; empty where that isn't known yet.

        Raises:
            QwireError: RESOURCE_EXHAUSTED at a limit, or where the deadline would pass before its turn;
                DEADLINE_EXCEEDED where it has passed.
        """
        if claim.deadline <= self._clock():
            raise _too_late()
        use = self._tenants.get(tenant) or _Use(self._tenant_limits)
        error = self._refusal(use, claim, tokens, model)
        if error is not None:
            self.refused += 1
            raise error
        self._tenants[tenant] = use
        ticket = Ticket(self, tenant, claim, tokens)
        for count in (self._all.queued, use.queued):
            count.add(tokens)
        return ticket

    def serve_soon(self) -> None:
        """There may be room: whose turn it is gets it, once the event loop comes to it."""
        if self._serving is None:
            self._serving = asyncio.get_running_loop().call_soon(self._serve)

    def estimate(self, model: str, priority: int) -> float:
        """Seconds until the turn of a request that came now; 0 if there is nothing to go by."""
        lane = self._lanes.get(model)
        if lane is None:
            return 0.0
        ahead = range(max(priority, MIN_PRIORITY), MAX_PRIORITY + 1)
        tokens = sum(lane.waiting[level] for level in ahead)
        prefill = self._fleet.prefill_seconds(model, tokens * lane.uncached.value)
        if not len(lane.queue) and self._spare(model, self._all) > self.queued:
            return prefill
        requests = 1 + sum(lane.waiting_requests[level] for level in ahead)
        return max(prefill, requests * lane.pace.seconds(self._clock()))

    def _refusal(self, use: _Use, claim: Claim, tokens: int, model: str) -> QwireError | None:
        if (error := self._over_limit(use, tokens, claim.priority, model)) is not None:
            return error
        if claim.deadline == math.inf:
            return None
        remaining = claim.deadline - self._clock()
        if (wait := self.estimate(model, claim.priority)) <= max(0.0, remaining):
            return None
        return _overloaded(
            f"the wait is estimated at {wait:.1f} s, and the deadline is in {remaining:.1f} s",
            Reason.DEADLINE_UNREACHABLE,
            wait - remaining,
        )

    def _over_limit(self, use: _Use, tokens: int, priority: int, model: str) -> QwireError | None:
        spare = self._spare(model, self._all)
        for who, whose, flag in ((self._all, "", ""), (use, " of this tenant", "tenant-")):
            # Those for whom there is room only pass through the queue.
            through = max(0, min(spare, who.may_run))
            if who.queued.requests - through >= who.limits.queued:
                limit = f"{who.limits.queued} requests{whose} wait already (--{flag}max-queued)"
            elif who.queued.requests >= through and who.queued.tokens + tokens > who.limits.queued_tokens:
                limit = f"over {who.limits.queued_tokens} prompt tokens{whose} would wait (--{flag}max-queued-tokens)"
            else:
                continue
            return _overloaded(limit, Reason.OVERLOADED, self.estimate(model, priority))
        return None

    def _spare(self, model: str, use: _Use) -> int:
        """How many that come now would not have to wait but for those that are queued."""
        room = self._fleet.room(Wanted(model))
        granted = lane.granted if (lane := self._lanes.get(model)) is not None else 0
        return max(0, min((room or 0) - granted, use.may_run))

    async def _wait(self, ticket: Ticket, wanted: Wanted) -> None:
        now, claim = self._clock(), ticket.claim
        if ticket.wanted is None:
            lane = self._lanes.setdefault(wanted.model, _Lane())
            lane.shares.enter(claim)
        else:
            lane = self._lanes[ticket.wanted.model]
        ticket.wanted = wanted
        turn = ticket.turn = asyncio.get_running_loop().create_future()
        lane.queue.add(ticket, claim, now)
        lane.waiting[claim.priority] += ticket.tokens
        lane.waiting_requests[claim.priority] += 1
        self._serve()
        if not turn.done():
            lane.pace.waits(now)
        try:
            async with asyncio.timeout(None if claim.deadline == math.inf else max(0.0, claim.deadline - now)):
                await turn
        except TimeoutError:
            raise _too_late() from None
        finally:
            ticket.turn = None
            self._give_up(lane, ticket)

    def _give_up(self, lane: _Lane, ticket: Ticket) -> None:
        """Ends a wait in vain, if there is one."""
        if ticket in lane.queue:
            lane.queue.remove(ticket)
            self._no_longer_waits(lane, ticket)
            if not len(lane.queue):
                lane.pace.empty()

    def _serve(self) -> None:
        """Gives turns while there is room."""
        if self._serving is not None:
            self._serving.cancel()
            self._serving = None
        for lane in self._lanes.values():
            while len(lane.queue) and (ticket := self._next(lane)) is not None:
                self._grant(lane, ticket)

    def _next(self, lane: _Lane) -> Ticket | None:
        """Whose turn it is, among those for whom there is room."""
        rooms: dict[Wanted, bool] = {}
        for ticket in lane.queue.in_order(self._clock()):
            wanted = ticket.wanted
            if wanted is None:
                raise RuntimeError("a ticket waits for nothing")
            if not self._all.takes(ticket.tokens):
                return None
            if wanted not in rooms:
                room = self._fleet.room(wanted)
                # Where no worker is ready, the wait for one is another's, and bounded in time.
                rooms[wanted] = room is None or room > lane.granted
                if not rooms[wanted] and (self._fleet.room(Wanted(wanted.model)) or 0) <= lane.granted:
                    return None
            if rooms[wanted] and self._tenants[ticket.tenant].takes(ticket.tokens):
                return ticket
        return None

    def _grant(self, lane: _Lane, ticket: Ticket) -> None:
        now = self._clock()
        lane.queue.take(ticket, now)
        self._no_longer_waits(lane, ticket)
        lane.pace.turn(now, more=len(lane.queue) > 0)
        lane.granted += 1
        ticket.running = ticket.granted = True
        for use in (self._all, self._tenants[ticket.tenant]):
            use.queued.take(ticket.tokens)
            use.running.add(ticket.tokens)
        if ticket.turn is not None and not ticket.turn.done():
            ticket.turn.set_result(None)

    def _no_longer_waits(self, lane: _Lane, ticket: Ticket) -> None:
        lane.waiting[ticket.claim.priority] -= ticket.tokens
        lane.waiting_requests[ticket.claim.priority] -= 1

    def _placed(self, ticket: Ticket, uncached_tokens: int) -> None:
        if not ticket.granted or ticket.wanted is None:
            return  # it has moved
        lane = self._lanes[ticket.wanted.model]
        self._ungrant(lane, ticket)
        lane.shares.charge(ticket.claim, ticket.tokens)
        lane.uncached.take(min(1.0, uncached_tokens / max(1, ticket.tokens)))

    def _ungrant(self, lane: _Lane, ticket: Ticket) -> None:
        if ticket.granted:
            ticket.granted = False
            lane.granted -= 1

    def _put_back(self, ticket: Ticket) -> None:
        if ticket.wanted is None or not ticket.running:
            return
        self._ungrant(self._lanes[ticket.wanted.model], ticket)
        ticket.running = False
        for use in (self._all, self._tenants[ticket.tenant]):
            use.running.take(ticket.tokens)
            use.queued.add(ticket.tokens)

    def _recount(self, ticket: Ticket, tokens: int) -> None:
        for use in (self._all, self._tenants[ticket.tenant]):
            use.queued.tokens += tokens - ticket.tokens
        ticket.tokens = tokens

    def _charge(self, ticket: Ticket, tokens: int) -> None:
        if ticket.wanted is not None:
            self._lanes[ticket.wanted.model].shares.charge(ticket.claim, tokens)

    def _leave(self, ticket: Ticket) -> None:
        use = self._tenants[ticket.tenant]
        for who in (self._all, use):
            (who.running if ticket.running else who.queued).take(ticket.tokens)
        if ticket.wanted is not None:
            lane = self._lanes[ticket.wanted.model]
            self._give_up(lane, ticket)  # who waits may have been cancelled and not have heard of it yet
            self._ungrant(lane, ticket)
            lane.shares.leave(ticket.claim)
        if use.empty:
            del self._tenants[ticket.tenant]
        self.serve_soon()


def _too_late() -> QwireError:
    message = "the deadline passed before the request's turn"
    return QwireError(grpc.StatusCode.DEADLINE_EXCEEDED, message, reason=Reason.DEADLINE)


def _overloaded(message: str, reason: Reason, wait: float) -> QwireError:
    shortest, longest = RETRY_SECONDS
    retry_after = min(max(shortest, wait), longest) * random.uniform(1 - RETRY_JITTER, 1 + RETRY_JITTER)  # noqa: S311
    # Not finer, so that answers are alike, and made once.
    return QwireError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, reason=reason, retry_after=round(retry_after, 2))
