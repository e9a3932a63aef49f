"""Both clients go on with a cut stream by themselves, at any router, and deliver each token once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest

from qwire import AsyncClient, Client, QwireError, Reason
from qwire._tries import DELAYS, MAX_TRIES, Tries, Turns
from qwire.v1 import generation_pb2 as gen
from tests.client.test_clients import Outcome, read_async, read_blocking
from tests.helpers.fake_server import FakeServer, Hang, accepted, delta, finished, whole_stream

TOKEN = b"opaque"
CUT = QwireError(grpc.StatusCode.UNAVAILABLE, "gone")
NOWHERE = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwire._tries.DELAYS", (0.01,) * MAX_TRIES)


@pytest.fixture(params=[read_blocking, read_async], ids=["blocking", "async"])
def read(request: pytest.FixtureRequest) -> Callable[..., Outcome]:
    reader: Callable[..., Outcome] = request.param
    return reader


@pytest.fixture
def other() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


def begun(**values: object) -> gen.GenerateResponse:
    return accepted(resume_token=TOKEN, **values)


def resume(*choices: gen.ResumeChoice) -> gen.Resume:
    return gen.Resume(token=TOKEN, choices=choices)


def test_a_cut_stream_goes_on_where_it_was(server: FakeServer, read: Callable[..., Outcome]) -> None:
    _, first, second, *rest = whole_stream()
    server.scripts = [[begun(), first, CUT], [begun(), second, CUT], [begun(), *rest]]
    outcome = read(server.address, max_tokens=8)
    assert outcome.error is None
    assert (outcome.generation.text, outcome.generation.token_ids) == ("Héllo!", [10, 11, 12, 13])
    assert [item.text for item in outcome.deltas] == ["Hé", "llo", "", "!"]
    plain = gen.GenerateRequest(text="hi", stop=gen.StopOptions(max_tokens=8))
    assert server.requests[0] == plain
    plain.request_id = "r1"
    plain.resume.CopyFrom(resume(gen.ResumeChoice(token_ids=[10], text_bytes=3)))
    assert server.requests[1] == plain
    plain.resume.CopyFrom(resume(gen.ResumeChoice(token_ids=[10, 11, 12], text_bytes=6)))
    assert server.requests[2] == plain


def test_another_router_goes_on(server: FakeServer, other: FakeServer, read: Callable[..., Outcome]) -> None:
    stream = whole_stream()
    server.scripts = [[begun(), *stream[1:3], CUT]]
    other.scripts = [[begun(), *stream[3:]]]
    outcome = read([server.address, other.address])
    assert (outcome.error, outcome.generation.text) == (None, "Héllo!")
    assert [len(fake.requests) for fake in (server, other)] == [1, 1]


def test_choices_that_have_finished_are_said_to_have(server: FakeServer, read: Callable[..., Outcome]) -> None:
    two = begun(sampling=gen.SamplingParams(n=2))
    server.scripts = [
        [two, delta(0, [1], 0, "a"), delta(0, [2], 0, "b", choice=1), finished(1), CUT],
        [two, delta(1, [3], 1, "c", choice=1), finished(2, choice=1)],
    ]
    choices = read(server.address).generation.choices
    assert [(choice.text, choice.token_ids) for choice in choices.values()] == [("a", [1]), ("bc", [2, 3])]
    assert server.requests[1].resume == resume(
        gen.ResumeChoice(token_ids=[1], text_bytes=1, finished=True), gen.ResumeChoice(token_ids=[2], text_bytes=1)
    )


def test_a_stream_of_which_only_the_status_is_missing_is_whole(
    server: FakeServer, read: Callable[..., Outcome]
) -> None:
    server.scripts = [[begun(), *whole_stream()[1:], CUT]]
    outcome = read(server.address)
    assert (outcome.error, outcome.generation.text, len(server.requests)) == (None, "Héllo!", 1)


def test_a_router_that_doubles_or_leaves_out_is_found_out(server: FakeServer, read: Callable[..., Outcome]) -> None:
    for wrong in (delta(0, [10], 0, "Hé"), delta(2, [12], 3, "o"), delta(1, [11], 4, "x")):
        server.scripts = [[begun(), delta(0, [10], 0, "Hé"), CUT], [begun(), wrong, finished(2)]]
        error = read(server.address).error
        assert error is not None
        assert error.code is grpc.StatusCode.INTERNAL


def test_without_progress_it_gives_up_and_with_progress_it_does_not(
    server: FakeServer, read: Callable[..., Outcome]
) -> None:
    server.scripts = [[begun(), delta(0, [10], 0, "a"), CUT]]
    server.script = [begun(), CUT]
    error = read(server.address).error
    assert error is not None
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert len(server.requests) == 1 + MAX_TRIES
    server.requests.clear()
    server.scripts = [[begun(), delta(index, [1], index, "a"), CUT] for index in range(2 * MAX_TRIES)]
    server.scripts.append([begun(), finished(2 * MAX_TRIES)])
    outcome = read(server.address)
    assert (outcome.error, outcome.generation.text) == (None, "a" * 2 * MAX_TRIES)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.ABORTED, Reason.SUPERSEDED),
        (grpc.StatusCode.INTERNAL, Reason.REQUEST_FAULTS_WORKER),
        (grpc.StatusCode.FAILED_PRECONDITION, Reason.RESUME_MISMATCH),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
    ],
)
def test_what_would_end_alike_is_not_tried_again(
    server: FakeServer, read: Callable[..., Outcome], code: grpc.StatusCode, reason: str
) -> None:
    server.script = [begun(), delta(0, [10], 0, "a"), QwireError(code, "no", reason=reason)]
    error = read(server.address).error
    assert error is not None
    assert (error.code, len(server.requests)) == (code, 1)


def test_a_slow_reader_goes_on_when_it_reads_again(server: FakeServer, read: Callable[..., Outcome]) -> None:
    slow = QwireError(grpc.StatusCode.RESOURCE_EXHAUSTED, "slow", reason=Reason.SLOW_READER)
    stream = whole_stream()
    server.scripts = [[begun(), *stream[1:3], slow], [begun(), *stream[3:]]]
    outcome = read(server.address)
    assert (outcome.error, outcome.generation.text) == (None, "Héllo!")


def test_without_ids_the_text_is_what_counts(server: FakeServer, read: Callable[..., Outcome]) -> None:
    server.scripts = [
        [begun(), delta(0, [], 0, "Hé"), CUT],
        [begun(), delta(0, [], 3, ""), delta(1, [], 3, "llo"), finished(3)],
    ]
    outcome = read(server.address, ids=False)
    assert (outcome.error, outcome.generation.text) == (None, "Héllo")
    assert server.requests[1].resume == resume(gen.ResumeChoice(text_bytes=3))
    server.scripts = [[begun(), delta(0, [], 0, "Hé"), CUT]]
    assert read(server.address, ids=False, logprobs=1).error is not None


def test_a_call_that_finds_no_router_goes_to_the_next(server: FakeServer, read: Callable[..., Outcome]) -> None:
    outcome = read([NOWHERE, server.address])
    assert (outcome.error, outcome.generation.text) == (None, "Héllo!")
    with Client([NOWHERE, server.address]) as client:
        assert [len(client.models()), client.encode("hi")] == [1, [104, 105]]

    async def both() -> list[int]:
        async with AsyncClient([NOWHERE, server.address]) as client:
            return [len(await client.models()), len(await client.encode("hi"))]

    assert asyncio.run(both()) == [1, 2]


def test_an_earlier_try_may_live_on_for_a_moment(server: FakeServer, read: Callable[..., Outcome]) -> None:
    duplicate = QwireError(grpc.StatusCode.ALREADY_EXISTS, "live", reason=Reason.DUPLICATE_REQUEST_ID)
    server.scripts = [[CUT], [duplicate]]
    assert read([server.address, server.address], request_id="r1").generation.text == "Héllo!"
    server.scripts = [[duplicate]]
    assert read(server.address, request_id="r1").error is not None


def test_the_deadline_is_one_for_all_tries(
    server: FakeServer, read: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwire._tries.DELAYS", (0.3,) * MAX_TRIES)
    server.scripts = [[begun(), CUT], [begun(), Hang()]]
    started = time.monotonic()
    error = read(server.address, timeout=1).error
    assert error is not None
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.9 < time.monotonic() - started < 10
    first, second = server.remaining
    assert first is not None and second is not None and second < first - 0.2


def test_cancelling_while_it_waits_for_the_next_try(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwire._tries.DELAYS", (30.0,) * MAX_TRIES)
    server.script = [begun(), CUT]
    with Client(server.address) as client:
        generation = client.generate("hi")
        generation.start()
        timer = threading.Timer(0.1, generation.cancel)
        timer.start()
        started = time.monotonic()
        with pytest.raises(QwireError) as caught:
            generation.read()
        timer.join()
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert time.monotonic() - started < 10


async def test_cancelling_while_it_waits_async(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwire._tries.DELAYS", (30.0,) * MAX_TRIES)
    server.script = [begun(), CUT]
    async with AsyncClient(server.address) as client:
        generation = client.generate("hi")
        await generation.start()
        asyncio.get_running_loop().call_later(0.1, generation.cancel)
        with pytest.raises(QwireError) as caught:
            await asyncio.wait_for(generation.read(), 10)
    assert caught.value.code is grpc.StatusCode.CANCELLED


def test_addresses() -> None:
    for addresses in ([], [NOWHERE] * 65):
        with pytest.raises(ValueError, match="1 to 64 addresses"):
            Client(addresses)


def test_where_and_when_the_next_try_is() -> None:
    turns = Turns(3)
    assert [turns.call(None).router for _ in range(4)] == [0, 1, 2, 0]
    tries = Tries(3, 2, None)
    tries.begun = True
    waits = [tries.after(CUT) for _ in range(MAX_TRIES + 1)]
    assert waits[:2] == [0.0, 0.0]
    assert None not in waits[2:MAX_TRIES]
    assert waits[MAX_TRIES] is None
    later = QwireError(grpc.StatusCode.UNAVAILABLE, "", reason=Reason.NO_WORKER, retry_after=9.0)
    alone = Tries(1, 0, None)
    assert alone.after(later) is None  # it has said why, and there is no other
    alone.begun = True
    alone.progressed()
    assert alone.after(later) == 9.0
    hurried = Tries(1, 0, 1.0)
    hurried.begun = True
    assert hurried.after(later) is None  # its time is over by then
    assert len(DELAYS) == MAX_TRIES


def test_one_router_is_asked_again_by_grpc_as_the_published_config_says(
    server: FakeServer, read: Callable[..., Outcome]
) -> None:
    refused = QwireError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason=Reason.OVERLOADED, retry_after=0.05)
    server.scripts = [[refused], [refused]]
    outcome = read(server.address)
    assert (outcome.error, outcome.generation.text) == (None, "Héllo!")
    assert len(server.requests) == 3
    assert [metadata.get("grpc-previous-rpc-attempts") for metadata in server.metadata] == [None, "1", "2"]


def test_several_routers_are_asked_in_turn_while_they_are_full(
    server: FakeServer, other: FakeServer, read: Callable[..., Outcome]
) -> None:
    refused = QwireError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason=Reason.OVERLOADED, retry_after=0.05)
    server.scripts, other.scripts = [[refused], [refused]], [[refused]]
    outcome = read([server.address, other.address])
    assert (outcome.error, outcome.generation.text) == (None, "Héllo!")
    assert (len(server.requests), len(other.requests)) == (2, 2)
    assert "grpc-previous-rpc-attempts" not in other.metadata[-1]


def test_a_request_of_the_largest_size_is_sent_again(server: FakeServer) -> None:
    server.scripts = [[CUT]]
    with Client(server.address) as client:
        assert client.generate("x" * (3 << 20)).read().text == "Héllo!"
    assert len(server.requests) == 2
