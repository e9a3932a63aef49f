"""Both clients against a scripted server: the same tests, through one small interface."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import pytest

from qwire import AsyncClient, Client, FieldViolation, QwireError
from qwire.v1 import generation_pb2 as gen
from qwire.v1 import tokenizer_pb2 as tok
from tests.helpers.fake_server import FakeServer, Hang, Step, accepted, delta, finished, whole_stream

REFUSAL = QwireError(
    grpc.StatusCode.INVALID_ARGUMENT,
    "bad",
    reason="INVALID_REQUEST",
    violations=[FieldViolation("sampling.top_p", "must be in (0, 1]; is 2")],
    retry_after=0.25,
)


class Outcome:
    """What reading a whole stream gave."""

    def __init__(self) -> None:
        self.deltas: list[gen.Delta] = []
        self.generation: Any = None
        self.error: QwireError | None = None


def read_blocking(address: str | list[str], **options: Any) -> Outcome:
    outcome = Outcome()
    with Client(address) as client:
        outcome.generation = client.generate("hi", **options)
        try:
            for item in outcome.generation:
                outcome.deltas.append(item)
        except QwireError as error:
            outcome.error = error
    return outcome


def read_async(address: str | list[str], **options: Any) -> Outcome:
    outcome = Outcome()

    async def read() -> None:
        async with AsyncClient(address) as client:
            outcome.generation = client.generate("hi", **options)
            try:
                async for item in outcome.generation:
                    outcome.deltas.append(item)
            except QwireError as error:
                outcome.error = error

    asyncio.run(read())
    return outcome


@pytest.fixture(params=[read_blocking, read_async], ids=["blocking", "async"])
def read(request: pytest.FixtureRequest) -> Callable[..., Outcome]:
    reader: Callable[..., Outcome] = request.param
    return reader


def test_a_stream(server: FakeServer, read: Callable[..., Outcome]) -> None:
    outcome = read(server.address, max_tokens=8)
    assert outcome.error is None
    assert [item.text for item in outcome.deltas] == ["Hé", "llo", "", "!"]
    generation = outcome.generation
    assert (generation.text, generation.token_ids) == ("Héllo!", [10, 11, 12, 13])
    assert generation.accepted.request_id == "r1"
    assert generation.finished.reason == gen.FINISH_REASON_EOS
    assert generation.choices[0].text_bytes == 7
    assert server.requests == [gen.GenerateRequest(text="hi", stop=gen.StopOptions(max_tokens=8))]
    assert str(server.metadata[0]["user-agent"]).startswith("qwire/")


def test_choices_are_kept_apart(server: FakeServer, read: Callable[..., Outcome]) -> None:
    server.script = [
        accepted(sampling=gen.SamplingParams(n=2)),
        delta(0, [1], 0, "a"),
        delta(0, [2], 0, "b", choice=1),
        finished(1),
        delta(1, [3], 1, "c", choice=1),
        finished(2, choice=1),
    ]
    choices = read(server.address).generation.choices
    assert [(choice.text, choice.token_ids) for choice in choices.values()] == [("a", [1]), ("bc", [2, 3])]


BROKEN: list[tuple[str, list[Step], str]] = [
    ("a token is missing", [accepted(), delta(0, [1], 0, "a"), delta(2, [3], 1, "c")], "token 2 .* where 1 is next"),
    ("a token is doubled", [accepted(), delta(0, [1], 0, "a"), delta(0, [1], 1, "a")], "token 0 .* where 1 is next"),
    ("text is missing", [accepted(), delta(0, [1], 0, "é"), delta(1, [2], 3, "c")], "byte 3 .* where 2 is next"),
    ("characters for bytes", [accepted(), delta(0, [1], 0, "é"), delta(1, [2], 1, "c")], "byte 1 .* where 2 is next"),
    ("the last delta is missing", [accepted(), delta(0, [1], 0, "a"), finished(2)], "2 tokens .* counted, 1 delivered"),
    ("nothing was accepted", [delta(0, [1], 0, "a")], "delta before Accepted"),
    ("accepted twice", [accepted(), accepted()], "second Accepted"),
    ("more after the end", [accepted(), finished(0), delta(0, [1], 0, "a")], "which has finished"),
    ("finished twice", [accepted(), finished(0), finished(0)], "which has finished"),
    ("not finished", [accepted(), delta(0, [1], 0, "a")], "before choice 0 finished"),
    ("empty", [], "end before Accepted"),
]


@pytest.mark.parametrize(("script", "match"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_stream_is_found(
    server: FakeServer, read: Callable[..., Outcome], script: list[Step], match: str
) -> None:
    server.script = script
    error = read(server.address).error
    assert error is not None
    assert error.code == grpc.StatusCode.INTERNAL
    with pytest.raises(QwireError, match=match):
        raise error
    assert server.ended.wait(5)


def test_ids_or_text_turned_off(server: FakeServer, read: Callable[..., Outcome]) -> None:
    server.script = [accepted(), delta(0, [], 0, "a"), delta(1, [], 1, "b"), finished(2)]
    outcome = read(server.address, ids=False)
    assert (outcome.error, outcome.generation.text) == (None, "ab")
    server.script = [accepted(), delta(0, [1], 0, ""), delta(1, [2], 1, ""), finished(2)]
    outcome = read(server.address, text=False)
    assert (outcome.error, outcome.generation.token_ids) == (None, [1, 2])


def test_an_unknown_event_is_skipped(server: FakeServer, read: Callable[..., Outcome]) -> None:
    future = gen.GenerateResponse.FromString(b"\xfa\x01\x02hi")  # Field 31.
    server.script = [accepted(), future, *whole_stream()[1:]]
    assert read(server.address).generation.text == "Héllo!"


def test_a_refusal(server: FakeServer, read: Callable[..., Outcome]) -> None:
    server.script = [REFUSAL]
    error = read(server.address).error
    assert error is not None
    assert (error.code, error.message, error.reason) == (REFUSAL.code, REFUSAL.message, REFUSAL.reason)
    assert (error.violations, error.retry_after) == (REFUSAL.violations, 0.25)


def test_what_came_before_an_error_is_kept(server: FakeServer, read: Callable[..., Outcome]) -> None:
    server.script = [*whole_stream()[:3], QwireError(grpc.StatusCode.UNAVAILABLE, "gone", reason="WORKER_LOST")]
    outcome = read(server.address)
    assert outcome.error is not None
    assert outcome.error.reason == "WORKER_LOST"
    assert (outcome.generation.text, outcome.generation.finished) == ("Héllo", None)


def test_timeout(server: FakeServer, read: Callable[..., Outcome]) -> None:
    server.script = [accepted(), Hang()]
    error = read(server.address, timeout=0.3).error
    assert error is not None
    assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert server.remaining[0] is not None
    assert server.remaining[0] <= 0.31  # gRPC rounds up to milliseconds on the way


def test_no_server(read: Callable[..., Outcome]) -> None:
    error = read("127.0.0.1:1").error
    assert error is not None
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "")


def test_leaving_early_cancels_blocking(server: FakeServer) -> None:
    server.script = [accepted(), delta(0, [1], 0, "a"), Hang()]
    with Client(server.address) as client, client.generate("hi") as generation:
        assert next(generation).text == "a"
        assert not server.ended.is_set()
    assert server.ended.wait(5)
    assert generation.text == "a"


def test_cancel_from_another_thread(server: FakeServer) -> None:
    server.script = [accepted(), Hang()]
    with Client(server.address) as client:
        generation = client.generate("hi")
        assert generation.start().prompt_tokens == 3
        timer = threading.Timer(0.1, generation.cancel)
        timer.start()
        with pytest.raises(QwireError) as caught:
            generation.read()
        timer.join()
    assert caught.value.code == grpc.StatusCode.CANCELLED
    assert server.ended.wait(5)


async def test_leaving_early_cancels_async(server: FakeServer) -> None:
    server.script = [accepted(), delta(0, [1], 0, "a"), Hang()]
    async with AsyncClient(server.address) as client, client.generate("hi") as generation:
        assert (await anext(generation)).text == "a"
        assert not server.ended.is_set()
    assert await asyncio.to_thread(server.ended.wait, 5)


async def test_cancel_async(server: FakeServer) -> None:
    server.script = [accepted(), Hang()]
    async with AsyncClient(server.address) as client:
        generation = client.generate("hi")
        assert (await generation.start()).prompt_tokens == 3
        asyncio.get_running_loop().call_later(0.1, generation.cancel)
        with pytest.raises(QwireError) as caught:
            await generation.read()
        assert caught.value.code == grpc.StatusCode.CANCELLED


async def test_cancelling_the_task_cancels_the_call(server: FakeServer) -> None:
    server.script = [accepted(), Hang()]
    async with AsyncClient(server.address) as client:
        task = asyncio.create_task(client.generate("hi").read())
        while not server.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.ended.wait, 10)


async def test_cancelling_the_task_as_its_request_was_sent_cancels_the_call(server: FakeServer) -> None:
    server.script = [accepted(), Hang()]
    async with AsyncClient(server.address) as client:
        generation = client.generate("hi")
        sent: asyncio.Task[None] = generation._call._preparation  # type: ignore[attr-defined]
        sent.add_done_callback(lambda _: task.cancel())
        task = asyncio.create_task(generation.read())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.ended.wait, 10)


def both(server: FakeServer, call: Callable[[Any], Any], **client_options: Any) -> list[Any]:
    """What a unary call answers through each client."""

    async def run() -> Any:
        async with AsyncClient(server.address, **client_options) as client:
            answer: Coroutine[Any, Any, Any] = call(client)
            return await answer

    with Client(server.address, **client_options) as client:
        return [call(client), asyncio.run(run())]


def test_unary_calls(server: FakeServer) -> None:
    assert [[m.name for m in answer] for answer in both(server, lambda c: c.models())] == [["demo"]] * 2
    assert [answer.context_length for answer in both(server, lambda c: c.model("demo", timeout=5))] == [2048] * 2
    assert both(server, lambda c: c.encode("hi")) == [[104, 105]] * 2
    assert both(server, lambda c: c.encode_batch(["a", "b"])) == [[[97], [98]]] * 2
    assert both(server, lambda c: c.decode([104, 105], skip_special_tokens=False)) == ["hi"] * 2
    assert both(server, lambda c: c.decode_batch([[97], [98]])) == [["a", "b"]] * 2
    chat = [{"role": "user", "content": "x"}]
    assert [answer.text for answer in both(server, lambda c: c.render_chat(chat, template_time=7))] == ["rendered"] * 2
    assert server.others[0] == tok.EncodeRequest(texts=["hi"])
    assert server.others[4] == tok.DecodeRequest(sequences=[tok.TokenIds(ids=[104, 105])], skip_special_tokens=False)
    assert server.others[-1].template_time == 7


def test_unary_errors(server: FakeServer) -> None:
    with Client(server.address) as client:
        with pytest.raises(QwireError) as caught:
            client.model("other")
        assert caught.value.reason == "MODEL_NOT_FOUND"
        with pytest.raises(TypeError, match="encode"):
            client.encode_batch("text")


async def test_unary_errors_async(server: FakeServer) -> None:
    async with AsyncClient(server.address) as client:
        with pytest.raises(QwireError) as caught:
            await client.model("other")
        assert caught.value.reason == "MODEL_NOT_FOUND"


def test_metadata_goes_along(server: FakeServer) -> None:
    with Client(server.address, metadata=[("x-tenant", "t1")]) as client:
        client.generate("hi").read()
        client.generate_request(gen.GenerateRequest(text="raw", model="m")).read()
    assert [item["x-tenant"] for item in server.metadata] == ["t1", "t1"]
    assert server.requests[1] == gen.GenerateRequest(text="raw", model="m")


def test_responses_are_the_messages_themselves(server: FakeServer) -> None:
    with Client(server.address) as client:
        generation = client.generate("hi")
        assert list(generation.responses()) == whole_stream()
        assert generation.text == "Héllo!"
        assert list(generation) == []
