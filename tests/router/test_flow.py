"""Writes wait while the event loop is behind, and at most so long; else they don't."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwire.v1 import generation_pb2 as pb
from qwire.v1 import worker_pb2
from router.choice import OutputSpec
from router.flow import (
    ABREAST_SECONDS,
    ABREAST_SHARE,
    BEHIND_SECONDS,
    BEHIND_SHARE,
    LEAST_SECONDS,
    MOST_SECONDS,
    Flow,
)
from router.journal import Journal


def behind(flow: Flow, looks: int = 20) -> Flow:
    for _ in range(looks):
        flow.took(BEHIND_SECONDS, 0.5)
    return flow


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1))))
def test_the_wait_is_none_or_within_its_bounds(looks: list[tuple[float, float]]) -> None:
    flow = Flow()
    for late, busy in looks:
        flow.took(late, busy)
        assert flow.interval == 0 or LEAST_SECONDS <= flow.interval <= MOST_SECONDS


def test_the_wait_grows_while_the_loop_is_behind_and_ends_when_it_is_not() -> None:
    flow = behind(Flow())
    assert flow.interval == MOST_SECONDS
    for _ in range(100):
        flow.took(ABREAST_SECONDS, (ABREAST_SHARE + BEHIND_SHARE) / 2)
    assert flow.interval == MOST_SECONDS
    for _ in range(100):
        flow.took(ABREAST_SECONDS, ABREAST_SHARE)
    assert flow.interval == 0
    for _ in range(100):
        flow.took(ABREAST_SECONDS, BEHIND_SHARE)
    assert flow.interval == MOST_SECONDS


async def test_a_loop_that_never_rests_is_behind_though_its_timers_are_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.flow.time.thread_time", time.monotonic)  # as if the thread ran all the time
    flow = Flow()
    following = asyncio.create_task(flow.run())
    while not flow.interval:
        await asyncio.sleep(0.01)
    following.cancel()


def test_streams_are_written_to_at_once_while_the_loop_keeps_up() -> None:
    opened: list[int] = []
    valve = Flow().valve(lambda: opened.append(1))
    for _ in range(3):
        valve.knock()
    assert len(opened) == 3


async def test_a_stream_waits_for_its_turn_while_the_loop_is_behind() -> None:
    now = 100.0
    flow = behind(Flow(lambda: now))
    opened: list[str] = []
    first, second = (flow.valve(lambda name=name: opened.append(name)) for name in "ab")  # type: ignore[misc]
    first.knock()
    assert opened == ["a"]
    first.knock()
    first.knock()
    second.knock()
    assert opened == ["a", "b"]
    now += MOST_SECONDS
    while len(opened) < 3:
        await asyncio.sleep(0.01)
    await asyncio.sleep(2 * MOST_SECONDS)
    assert opened == ["a", "b", "a"]


async def test_what_comes_meanwhile_is_one_delta_and_an_end_is_not_waited_with() -> None:
    now = 100.0
    flow = behind(Flow(lambda: now))
    journal = Journal(
        OutputSpec(pb.StopOptions(max_tokens=99), False, True, 4096), range(1), 3, 0.0, lambda: 1.0, flow.valve
    )

    def step(index: int, end: bool = False) -> worker_pb2.SequenceStep:
        step = worker_pb2.SequenceStep(token_index=index, token_ids=[index])
        if end:
            step.end.reason = worker_pb2.END_REASON_LENGTH
        return step

    journal.receive(step(0))
    (message,) = await journal.next_messages()
    assert list(message.delta.token_ids) == [0]
    journal.receive(step(1))
    journal.receive(step(2))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(journal.next_messages(), 0.05)
    now += MOST_SECONDS
    (message,) = await journal.next_messages()
    assert (message.delta.token_index, list(message.delta.token_ids)) == (1, [1, 2])
    journal.receive(step(3, end=True))
    delta, finished = await journal.next_messages()
    assert list(delta.delta.token_ids) == [3] and finished.HasField("finished")
