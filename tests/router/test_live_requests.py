"""Places and request ids: who gets one, and who has to give one back."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from qwire.errors import QwireError, Reason
from router.live_requests import LiveRequest, LiveRequests

TASKS: set[asyncio.Task[None]] = set()
"""Keeps streams alive that a test says nothing more of."""


async def hold(
    requests: LiveRequests, request_id: str | None, *, again: bool = False, tenant: str = ""
) -> tuple[LiveRequest, asyncio.Event]:
    """A stream that lives until the event is set."""
    admitted: asyncio.Future[LiveRequest] = asyncio.get_running_loop().create_future()
    leave = asyncio.Event()

    async def live() -> None:
        try:
            async with requests.admit(tenant, request_id, again=again) as request:
                admitted.set_result(request)
                await leave.wait()
        except QwireError as error:
            admitted.set_exception(error)

    TASKS.add(asyncio.create_task(live()))
    return await admitted, leave


async def test_there_are_no_more_than_the_limit() -> None:
    requests = LiveRequests(2)
    _, leave = await hold(requests, None)
    await hold(requests, None)
    with pytest.raises(QwireError) as caught:
        await hold(requests, None)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
    assert caught.value.retry_after
    leave.set()
    await asyncio.sleep(0)
    assert len(requests) == 1
    await hold(requests, None)


async def test_an_id_is_free_again_when_its_stream_has_ended() -> None:
    requests = LiveRequests(9)
    _, leave = await hold(requests, "a")
    with pytest.raises(QwireError) as caught:
        await hold(requests, "a")
    assert caught.value.reason == Reason.DUPLICATE_REQUEST_ID
    await hold(requests, "a", tenant="other")
    leave.set()
    await asyncio.sleep(0)
    await hold(requests, "a")


async def test_one_that_supersedes_waits_for_the_first_to_give_back_what_it_holds() -> None:
    requests = LiveRequests(9)
    first, leave = await hold(requests, "a")
    second = asyncio.create_task(hold(requests, "a", again=True))
    await asyncio.sleep(0.01)
    assert not second.done()
    with pytest.raises(QwireError) as caught:
        first.check()
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.ABORTED, Reason.SUPERSEDED)
    leave.set()
    live, leave_second = await second
    live.check()
    with pytest.raises(QwireError):  # the id is the second's: the first took nothing along
        await hold(requests, "a")
    leave_second.set()
    await asyncio.sleep(0)
    assert len(requests) == 0


async def test_one_stuck_in_a_write_is_not_waited_for_and_counts_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.live_requests.SUPERSEDED_SECONDS", 0.01)
    requests = LiveRequests(2)
    await hold(requests, "a")
    await hold(requests, "a", again=True)
    with pytest.raises(QwireError) as caught:
        await hold(requests, "a", again=True)
    assert caught.value.reason == Reason.OVERLOADED


async def test_a_third_supersedes_a_second_that_still_waits() -> None:
    requests = LiveRequests(9)
    _, leave = await hold(requests, "a")
    second = asyncio.create_task(hold(requests, "a", again=True))
    await asyncio.sleep(0)
    third = asyncio.create_task(hold(requests, "a", again=True))
    await asyncio.sleep(0)
    leave.set()
    with pytest.raises(QwireError) as caught:
        await second
    assert caught.value.reason == Reason.SUPERSEDED
    (live, _) = await third
    live.check()
