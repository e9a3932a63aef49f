"""Who may wait, whose turn it is, and that every ticket is given back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, suppress

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwire.errors import QwireError, Reason
from qwire.ordering import Claim
from qwire.v1 import worker_pb2 as pb
from router.admission import Admission, Limits, Ticket, Wanted
from router.waits import Pace

PLENTY = Limits(queued=100, queued_tokens=10_000, running=100, running_tokens=10_000)
CONSTRAINED = frozenset({pb.FEATURE_CONSTRAINTS})


class Workers:
    """A fleet that says what the test tells it to say."""

    def __init__(self, room: int | None = 0) -> None:
        self.free = room
        self.special: dict[Wanted, int | None] = {}
        self.prefill = 0.0

    def room(self, wanted: Wanted) -> int | None:
        return self.special.get(wanted, self.free)

    def prefill_seconds(self, model: str, tokens: float) -> float:
        return self.prefill * tokens


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Router:
    """An admission, and requests that wait in it."""

    def __init__(self, limits: Limits = PLENTY, tenant_limits: Limits = PLENTY, room: int | None = 0) -> None:
        self.workers, self.clock = Workers(room), Clock()
        self.admission = Admission(self.workers, limits, tenant_limits, self.clock)
        self.served: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.entered: dict[str, AbstractContextManager[Ticket]] = {}
        ROUTERS.append(self)

    def enter(
        self, name: str, tenant: str = "", *, tokens: int = 1, priority: int = 0, seconds: float = math.inf
    ) -> Ticket:
        claim = Claim(tenant.encode(), priority, self.clock.now + seconds, self.clock.now)
        entered = self.admission.enter(tenant, claim, tokens, "m")
        ticket = entered.__enter__()
        self.entered[name] = entered
        return ticket

    async def wait(self, name: str, tenant: str = "", *, wanted: Wanted = Wanted("m"), **more: float) -> Ticket:  # noqa: B008
        """Enters and waits, in a task of its own."""
        ticket = self.enter(name, tenant, **more)  # type: ignore[arg-type]

        async def waiting() -> None:
            await ticket.wait(wanted)
            self.served.append(name)

        self.tasks[name] = asyncio.create_task(waiting())
        await turn_of_the_loop()
        return ticket

    async def leave(self, name: str) -> None:
        self.entered.pop(name).__exit__(None, None, None)
        await turn_of_the_loop()

    async def give(self, room: int) -> list[str]:
        """Says that there is room for so many, and returns whose turn it was."""
        before = len(self.served)
        self.workers.free = room
        self.admission.serve_soon()
        await turn_of_the_loop()
        return self.served[before:]

    async def close(self) -> None:
        """Ends what it has, and sees that nothing is left of it."""
        for task in self.tasks.values():
            task.cancel()
        for name in list(self.entered):
            await self.leave(name)
        admission = self.admission
        assert (admission.running, admission.queued, admission.queued_tokens, admission._tenants) == (0, 0, 0, {})
        for lane in admission._lanes.values():
            assert (lane.granted, len(lane.queue), sum(lane.waiting.values())) == (0, 0, 0)
            assert not any(lane.waiting_requests.values())


ROUTERS: list[Router] = []


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    yield
    while ROUTERS:
        await ROUTERS.pop().close()


async def turn_of_the_loop() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_without_a_queue_a_turn_comes_at_once() -> None:
    router = Router(room=2)
    await router.enter("a").wait(Wanted("m"))
    await router.enter("b").wait(Wanted("m"))
    assert (router.admission.queued, router.admission.running) == (0, 2)
    await router.wait("c")  # both places are given away, though no worker was sent them yet
    assert router.served == []
    await router.leave("a")
    assert router.served == ["c"]


async def test_turns_go_by_the_one_rule_and_as_many_as_there_is_room_for() -> None:
    router = Router()
    await router.wait("first", "a")
    await router.wait("second", "a")
    await router.wait("hurried", "a", seconds=5)
    await router.wait("important", "a", priority=1)
    await router.wait("other's", "b")
    assert await router.give(1) == ["important"]
    assert await router.give(2) == ["hurried"]  # "important" still holds one of the two
    assert sorted(await router.give(5)) == ["first", "other's", "second"]


async def test_a_tenant_that_has_had_less_goes_first() -> None:
    router = Router()
    tickets = {name: await router.wait(name, name[0], tokens=10) for name in ("a1", "a2", "a3", "b1")}
    for room, expected in ((1, "a1"), (1, "b1"), (1, "a2")):
        (name,) = await router.give(room)
        assert name == expected
        tickets[name].placed(10)


async def test_a_ticket_that_is_put_back_keeps_its_place() -> None:
    router = Router()
    first = await router.wait("first")
    router.clock.now += 1
    await router.wait("second")
    assert await router.give(1) == ["first"]
    first.put_back()
    router.workers.free = 0
    waiting = router.tasks["first"] = asyncio.create_task(first.wait(Wanted("m")))
    await turn_of_the_loop()
    assert not waiting.done()
    assert (router.admission.queued, router.admission.running) == (2, 0)
    await router.give(1)
    assert waiting.done()
    assert router.served == ["first"]


async def test_where_no_worker_is_ready_it_is_the_placement_that_waits() -> None:
    router = Router(room=None)
    await router.wait("a")
    assert router.served == ["a"]


async def test_what_others_have_no_room_for_does_not_wait_behind_them() -> None:
    router = Router(room=1)
    special = Wanted("m", CONSTRAINED)
    router.workers.special[special] = 0
    await router.wait("special", wanted=special)
    await router.wait("plain")
    assert router.served == ["plain"]


async def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    router = Router(Limits(queued=2, queued_tokens=100, running=100, running_tokens=100))
    await router.wait("a")
    await router.wait("b")
    with pytest.raises(QwireError) as caught:
        router.enter("c")
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
    assert "2 requests" in error.message and "--max-queued" in error.message
    assert error.retry_after is not None and 0.3 < error.retry_after < 40
    assert router.admission.refused == 1
    router.workers.free = 1
    router.enter("c")  # there is room for one of the three


async def test_what_is_refused_whatever_it_holds_need_not_be_read() -> None:
    limits = Limits(queued=3, queued_tokens=100, running=100, running_tokens=100)
    router = Router(limits, tenant_limits=Limits(queued=2, queued_tokens=100, running=100, running_tokens=100))
    admission = router.admission
    await router.wait("a", "a")
    assert admission.refuse("a", "m") is None
    await router.wait("a2", "a")
    error = admission.refuse("a", "m")
    assert error is not None and "--tenant-max-queued" in error.message and admission.refused == 1
    assert admission.refuse("b", "m") is None
    await router.wait("b", "b")
    error = admission.refuse("b", "m")
    assert error is not None and "--max-queued" in error.message and error.retry_after is not None
    router.workers.free = 4
    assert admission.refuse("c", "m") is None
    assert admission.refused == 2


async def test_tokens_are_a_limit_of_what_waits_not_of_what_there_is_room_for() -> None:
    router = Router(Limits(queued=10, queued_tokens=100, running=100, running_tokens=1000), room=1)
    await router.enter("a", tokens=500).wait(Wanted("m"))
    await router.wait("b", tokens=60)
    with pytest.raises(QwireError) as caught:
        router.enter("c", tokens=41)
    assert "--max-queued-tokens" in caught.value.message
    router.enter("d", tokens=40).count(20)  # fewer than its bytes looked like
    assert router.admission.queued_tokens == 80


async def test_one_tenants_limits_are_not_anothers() -> None:
    router = Router(tenant_limits=Limits(queued=1, queued_tokens=100, running=1, running_tokens=100))
    await router.wait("a", "a")
    with pytest.raises(QwireError) as caught:
        router.enter("a2", "a")
    assert "--tenant-max-queued" in caught.value.message
    await router.wait("b", "b")
    assert sorted(await router.give(5)) == ["a", "b"]
    await router.wait("a2", "a")  # one of its runs: this one waits, whatever room there is
    assert router.served == ["a", "b"] or router.served == ["b", "a"]
    await router.leave("a")
    assert router.served[2:] == ["a2"]


async def test_running_tokens_are_limited_but_never_so_that_nothing_runs() -> None:
    router = Router(Limits(queued=10, queued_tokens=10_000, running=10, running_tokens=100), room=10)
    await router.wait("huge", tokens=500)
    await router.wait("small")
    assert router.served == ["huge"]
    await router.leave("huge")
    assert router.served == ["huge", "small"]


async def test_a_deadline_that_cannot_be_met_is_refused_with_the_estimate() -> None:
    router = Router()
    for number in range(6):
        await router.wait(f"{number}")
    for room in range(1, 4):
        router.clock.now += 10
        await router.give(room)
    assert 8 < router.admission.estimate("m", 0) / 4 < 11  # three wait before it, and turns are 10 s apart
    with pytest.raises(QwireError) as caught:
        router.enter("late", seconds=20)
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.DEADLINE_UNREACHABLE)
    assert "the deadline is in 20.0 s" in error.message
    router.enter("in time", seconds=60)
    router.enter("important", seconds=15, priority=1)  # none of those goes before it


async def test_prompts_that_workers_have_to_compute_count_as_waiting() -> None:
    router = Router()
    await router.wait("long", tokens=1000)
    router.workers.prefill = 0.01
    assert router.admission.estimate("m", 0) == 10
    with pytest.raises(QwireError) as caught:
        router.enter("late", seconds=9)
    assert caught.value.reason == Reason.DEADLINE_UNREACHABLE
    router.enter("in time", seconds=11)


async def test_a_deadline_that_passes_in_the_queue_ends_the_wait() -> None:
    router = Router()
    with pytest.raises(QwireError) as caught:
        router.enter("too late", seconds=0)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    ticket = router.enter("a", seconds=0.01)
    with pytest.raises(QwireError) as caught:
        await ticket.wait(Wanted("m"))
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await router.leave("a")
    assert (router.admission.queued, router.admission.queued_tokens) == (0, 0)


async def test_a_wait_that_is_cancelled_frees_its_place_at_once() -> None:
    router = Router(Limits(queued=1, queued_tokens=100, running=100, running_tokens=100))
    await router.wait("a")
    router.tasks["a"].cancel()
    await router.leave("a")
    await router.wait("b")
    assert await router.give(1) == ["b"]


@given(
    st.lists(st.tuples(st.sampled_from(["enter", "give", "back", "leave", "cancel"]), st.integers(0, 3)), max_size=60)
)
def test_whatever_happens_every_count_comes_back_to_nothing(actions: list[tuple[str, int]]) -> None:
    async def play() -> None:
        limits = Limits(queued=4, queued_tokens=20, running=3, running_tokens=12)
        router = Router(limits, limits)
        tickets: dict[str, Ticket] = {}
        for number, (action, pick) in enumerate(actions):
            name = list(tickets)[pick % len(tickets)] if tickets else ""
            match action:
                case "enter":
                    with suppress(QwireError):
                        tickets[str(number)] = await router.wait(str(number), str(pick), tokens=1 + pick, priority=pick)
                case "give":
                    await router.give(pick)
                case "back" if name and router.tasks[name].done() and not tickets[name].turn:
                    tickets[name].put_back()
                case "leave" if name:
                    router.tasks[name].cancel()
                    del tickets[name]
                    await router.leave(name)
                case "cancel" if name:
                    router.tasks[name].cancel()
                    await turn_of_the_loop()
            assert 0 <= router.admission.running <= limits.running
            assert router.admission.running + router.admission.queued == len(tickets)
        await ROUTERS.pop().close()

    asyncio.run(play())


def test_a_pace_goes_by_turns_of_what_waited_and_by_one_that_is_overdue() -> None:
    pace = Pace()
    pace.turn(1.0, more=True)  # it has not waited
    assert pace.seconds(5.0) == 0
    pace.waits(10.0)
    pace.turn(12.0, more=True)
    pace.turn(14.0, more=True)
    assert pace.seconds(14.0) == pytest.approx(2.0)
    assert pace.seconds(44.0) > 10
    pace.turn(16.0, more=False)
    assert pace.seconds(500.0) == pytest.approx(2.0)  # nothing waits
