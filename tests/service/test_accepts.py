"""How calls are accepted: together, refused unread where they are refused, and answered when the server stops."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from qwire.errors import QwireError, Reason
from qwire.service.accepts import AT_A_TIME, Metadata, Refusals, _Accepts
from qwire.service.server import Listener, Server
from qwire.v1 import models_pb2, models_pb2_grpc
from tests.helpers.wire import raw_unary

GET_MODEL = "/qwire.v1.ModelService/GetModel"
LIST_MODELS = "/qwire.v1.ModelService/ListModels"
FULL = (("room", "none"),)


class Models(models_pb2_grpc.ModelServiceServicer):
    """Knows every model, and lists none."""

    def __init__(self) -> None:
        self.asked = 0

    async def GetModel(self, request: models_pb2.GetModelRequest, context: Any) -> models_pb2.GetModelResponse:
        self.asked += 1
        await asyncio.sleep(0)
        return models_pb2.GetModelResponse(model=models_pb2.ModelInfo(name=request.model))

    async def ListModels(self, request: Any, context: Any) -> models_pb2.ListModelsResponse:
        return models_pb2.ListModelsResponse()


def refuse(metadata: Metadata) -> QwireError | None:
    if FULL[0] not in (metadata or ()):
        return None
    return QwireError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason=Reason.OVERLOADED, retry_after=0.5)


@asynccontextmanager
async def served(models: Models) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    refusals = Refusals([GET_MODEL], refuse)
    server = Server(Listener("127.0.0.1:0"), max_message_bytes=1 << 20, refusals=refusals, announce=False)
    server.add(models_pb2_grpc.add_ModelServiceServicer_to_server, models, "qwire.v1.ModelService")
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        yield server, channel
        await server.stop(0)


async def ended(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """How a call ended: its status, the reason, the text."""
    try:
        await call
    except grpc.aio.AioRpcError as caught:
        error = QwireError.from_rpc(caught)
        return error.code, error.reason, error.message
    return grpc.StatusCode.OK, "", ""


async def test_a_call_is_refused_before_anything_of_it_is_read() -> None:
    models = Models()
    async with served(models) as (_, channel):
        silent: Any = channel.stream_stream(GET_MODEL)(metadata=FULL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await silent.read()
        error = QwireError.from_rpc(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
        assert error.retry_after == 0.5
        assert dict(caught.value.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "500"
        stub = models_pb2_grpc.ModelServiceStub(channel)
        assert (await stub.GetModel(models_pb2.GetModelRequest(model="x"))).model.name == "x"
        assert models.asked == 1
        # Of methods that aren't named, none is.
        await stub.ListModels(models_pb2.ListModelsRequest(), metadata=FULL)


async def test_calls_are_accepted_together_and_each_is_answered() -> None:
    models = Models()
    async with served(models) as (server, channel):
        accepts = server.grpc._server._accepts  # type: ignore[attr-defined]
        assert {method: len(each._asked) for method, each in accepts.items()} == {
            None: AT_A_TIME,
            GET_MODEL.encode(): AT_A_TIME,
        }
        get, list_, nope = (raw_unary(channel, method) for method in (GET_MODEL, LIST_MODELS, "/nope.Nope/Nope"))
        calls = [
            each
            for _ in range(300)
            for each in (get(b""), get(b"", metadata=FULL), list_(b""), nope(b""), get(b"\xff\xff"))
        ]
        seen = Counter([(await ended(call))[:2] for call in calls])
        assert seen == {
            (grpc.StatusCode.OK, ""): 600,
            (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED): 300,
            (grpc.StatusCode.UNIMPLEMENTED, ""): 300,
            (grpc.StatusCode.INVALID_ARGUMENT, Reason.MALFORMED_MESSAGE): 300,
        }
        assert models.asked == 300


async def test_refused_calls_leave_nothing_for_the_garbage_collector() -> None:
    async with served(Models()) as (_, channel):
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                await ended(raw_unary(channel, GET_MODEL)(b"", metadata=FULL))
            await asyncio.sleep(0.1)
            kinds = Counter(type(each).__name__ for each in gc.get_objects())
            assert (kinds["_ServicerContext"], kinds["RPCState"]) == (0, 2 * AT_A_TIME)  # those that are asked for
        finally:
            gc.enable()


async def test_callers_that_are_gone_harm_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with served(Models()) as (_, channel):
        caplog.clear()  # of the server's start, where a test before this one has logging show that
        for _ in range(50):
            calls = [raw_unary(channel, GET_MODEL)(b"", metadata=FULL) for _ in range(10)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
        assert await ended(raw_unary(channel, GET_MODEL)(b"")) == (grpc.StatusCode.OK, "", "")
        gc.collect()
        assert not caplog.records


async def test_a_server_that_stops_answers_what_it_has_accepted() -> None:
    for _ in range(5):
        async with served(Models()) as (server, channel):
            await channel.channel_ready()
            calls = [raw_unary(channel, method)(b"") for method in (GET_MODEL, LIST_MODELS) for _ in range(100)]
            await asyncio.sleep(0.005)
            stopping = asyncio.create_task(server.stop(10))
            calls += [raw_unary(channel, GET_MODEL)(b"") for _ in range(20)]
            seen = {await ended(call) for call in calls}
            await stopping
        assert {code for code, *_ in seen} <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, seen


class Wire:
    """Where calls arrive, and are numbers."""

    def __init__(self) -> None:
        self.asking: list[asyncio.Future[int]] = []

    async def accept(self) -> int:
        self.asking.append(asyncio.get_running_loop().create_future())
        return await self.asking[-1]

    def arrive(self, call: int) -> None:
        self.asking.pop(0).set_result(call)


async def turns() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_calls_are_handed_on_in_their_order_whether_or_not_one_is_waited_for() -> None:
    wire = Wire()
    accepts = _Accepts(wire.accept, lambda call: call % 3 == 0)
    waited = accepts.next()
    await turns()
    assert len(wire.asking) == AT_A_TIME
    for call in range(AT_A_TIME):
        wire.arrive(call)
    await turns()
    handed_on = [call for call in range(AT_A_TIME) if call % 3]
    assert len(wire.asking) == AT_A_TIME - len(handed_on) + 1  # what isn't handed on counts among those
    assert [await waited] + [await accepts.next() for _ in handed_on[1:]] == handed_on
    await turns()
    assert len(wire.asking) == AT_A_TIME
    last = accepts.next()
    assert not last.done()
    wire.arrive(100)
    assert await last == 100
    for each in wire.asking:
        each.cancel()


async def test_what_fails_is_told_to_who_waits_and_what_is_there_at_the_end_is_answered() -> None:
    wire, answered = Wire(), list[int]()

    def answer(call: int) -> bool:
        answered.append(call)
        return ending

    ending = False
    accepts = _Accepts(wire.accept, answer)
    await turns()
    wire.arrive(1)
    wire.arrive(2)
    await turns()
    ending = True
    accepts.answer_ready()
    await turns()
    assert answered == [1, 2, 1, 2]
    assert len(wire.asking) == AT_A_TIME
    accepts.end()
    waited = accepts.next()
    wire.arrive(3)
    await turns()
    assert answered[4:] == [3]
    assert not waited.done()
    wire.asking.pop().set_exception(ConnectionError("the server is gone"))
    with pytest.raises(ConnectionError):
        await waited
    assert len(wire.asking) == AT_A_TIME - 2  # nothing more is asked for
    for each in wire.asking:
        each.cancel()
