"""Whose turn it is: the order by its definition, fairness between tenants, and bounds on every wait."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwire.ordering import (
    AGEING_SECONDS,
    MAX_IDLE,
    MAX_PRIORITY,
    MIN_PRIORITY,
    PATIENCE_SECONDS,
    Claim,
    Shares,
    TurnQueue,
)

TENANTS = (b"a", b"b", b"c")


class Turns:
    """A queue whose turns are taken one after another, each with its cost."""

    def __init__(self) -> None:
        self.shares = Shares()
        self.queue: TurnQueue[int] = TurnQueue(self.shares)
        self.claims: list[Claim] = []
        self.now = 0.0

    def add(self, **claim: object) -> int:
        self.claims.append(Claim(**{"arrival": self.now, **claim}))  # type: ignore[arg-type]
        self.shares.enter(self.claims[-1])
        self.queue.add(len(self.claims) - 1, self.claims[-1], self.now)
        return len(self.claims) - 1

    def take(self, cost: float = 1.0) -> int:
        number = self.queue.first(self.now)
        assert number is not None
        self.queue.take(number, self.now)
        self.shares.charge(self.claims[number], cost)
        self.shares.leave(self.claims[number])
        return number


def test_the_order_is_priority_then_share_then_deadline_then_arrival() -> None:
    turns = Turns()
    claims = [Claim(b"modest"), Claim(b"greedy")]
    for claim in claims:
        turns.shares.enter(claim)
    for claim, had in zip(claims, (5.0, 50.0), strict=True):
        turns.shares.charge(claim, had)
    names = {
        turns.add(tenant=b"greedy", deadline=1.0): "greedy, due",
        turns.add(tenant=b"modest"): "modest",
        turns.add(tenant=b"modest", arrival=-1.0): "modest, earlier",
        turns.add(tenant=b"modest", deadline=9.0): "modest, due",
        turns.add(tenant=b"greedy", priority=1): "above",
        turns.add(tenant=b"modest", priority=-1): "below",
    }
    order = [names[number] for number in turns.queue.in_order(0.0)]
    assert order == ["above", "modest, due", "modest, earlier", "modest", "greedy, due", "below"]


CLAIMS = st.builds(
    Claim,
    st.sampled_from(TENANTS),
    st.integers(-2, 2),
    st.one_of(st.just(math.inf), st.floats(0, 200)),
    st.floats(0, 100),
)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_life_of_a_queue_keeps_to_the_definition(data: st.DataObject) -> None:
    shares = Shares()
    queue: TurnQueue[int] = TurnQueue(shares)
    waiting: dict[int, Claim] = {}
    now = 0.0
    since: dict[int, float] = {}
    for number in range(data.draw(st.integers(1, 30))):
        now += data.draw(st.floats(0, 5))
        if data.draw(st.booleans()) and waiting:
            gone = data.draw(st.sampled_from(sorted(waiting)))
            claim = waiting.pop(gone)
            if data.draw(st.booleans()):
                queue.take(gone, now)
                since[claim.priority] = now
                shares.charge(claim, data.draw(st.floats(0, 9)))
            else:
                queue.remove(gone)
            shares.leave(claim)
        else:
            claim = data.draw(CLAIMS)
            if not any(other.priority == claim.priority for other in waiting.values()):
                since[claim.priority] = now
            waiting[number] = claim
            shares.enter(claim)
            queue.add(number, claim, now)

        def rank(number: int, now: float = now) -> tuple[float, ...]:
            claim = waiting[number]
            aged = claim.priority + math.floor((now - since[claim.priority]) / AGEING_SECONDS)
            return -aged, -claim.priority, shares.had(claim.group), claim.due, claim.arrival, number

        assert list(queue.in_order(now)) == sorted(waiting, key=rank)
        assert set(queue) == set(waiting) and len(queue) == len(waiting)
        assert all(number in queue for number in waiting)


@settings(max_examples=60, deadline=None)
@given(priority=st.integers(MIN_PRIORITY, MAX_PRIORITY), gap=st.floats(0.05, 1.0), others=st.integers(1, 3))
def test_a_flood_of_higher_priority_holds_nothing_up_for_ever(priority: int, gap: float, others: int) -> None:
    turns = Turns()
    low = turns.add(tenant=b"low", priority=priority)
    bound = (MAX_PRIORITY - priority + 1) * AGEING_SECONDS
    while True:
        for tenant in TENANTS[:others]:
            turns.add(tenant=tenant, priority=MAX_PRIORITY)
        if turns.take() == low:
            break
        turns.now += gap
    # An aged turn of another priority may come first, which this flood doesn't have.
    assert turns.now <= bound + gap


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.tuples(st.sampled_from(TENANTS), st.floats(0.1, 10)), min_size=1, max_size=60))
def test_tenants_that_always_ask_get_the_same_within_one_request(costs: list[tuple[bytes, float]]) -> None:
    turns = Turns()
    for tenant in TENANTS:
        for _ in range(len(costs) + 1):
            turns.add(tenant=tenant)
    had = dict.fromkeys(TENANTS, 0.0)
    for _, cost in costs:
        had[turns.claims[turns.take(cost)].tenant] += cost
        assert max(had.values()) - min(had.values()) <= 10


def test_a_new_tenant_is_behind_none_of_a_long_queue_and_claims_nothing_that_it_missed() -> None:
    turns = Turns()
    for _ in range(100):
        turns.add(tenant=b"flood")
    for _ in range(20):
        turns.take(7)
        turns.now += AGEING_SECONDS  # a long queue's requests get old, which outranks nobody
    new = [turns.add(tenant=b"new") for _ in range(10)]
    taken = [turns.take(7) for _ in range(8)]
    assert len(set(taken) & set(new)) == 4, "they take turns from here on"
    assert taken[0] in new or taken[1] in new


def test_a_tenant_that_comes_back_has_what_it_had() -> None:
    turns = Turns()
    turns.add(tenant=b"back")
    stays = turns.add(tenant=b"stays")
    assert turns.take(100) != stays
    turns.add(tenant=b"back")
    assert turns.take() == stays


@settings(max_examples=60, deadline=None)
@given(late=st.floats(0, 3 * PATIENCE_SECONDS), due_in=st.floats(0, 10))
def test_deadlines_go_before_what_has_none_until_its_patience_is_over(late: float, due_in: float) -> None:
    turns = Turns()
    patient = turns.add()
    turns.now = late
    urgent = turns.add(deadline=late + due_in)
    first = turns.queue.first(turns.now)
    assert first == (urgent if late + due_in < PATIENCE_SECONDS else patient)


def test_what_is_remembered_of_idle_tenants_is_bounded() -> None:
    shares = Shares()
    for number in range(2 * MAX_IDLE):
        claim = Claim(str(number).encode())
        shares.enter(claim)
        shares.charge(claim, 1.0)
        shares.leave(claim)
        shares.charge(claim, 1.0)  # nobody there: no effect
    assert len(shares._idle) == MAX_IDLE
    shares.enter(Claim(b"0"))
    shares.enter(Claim(str(2 * MAX_IDLE - 1).encode()))
    assert shares.had((0, b"0")) == 0.0
    assert shares.had((0, str(2 * MAX_IDLE - 1).encode())) == 1.0


def test_misuse_is_an_error() -> None:
    queue: TurnQueue[str] = TurnQueue(Shares())
    queue.add("a", Claim(), 0.0)
    with pytest.raises(ValueError, match="already"):
        queue.add("a", Claim(), 0.0)
    with pytest.raises(KeyError):
        queue.remove("b")
    assert queue.first(0.0) == "a"
    queue.remove("a")
    assert queue.first(0.0) is None
