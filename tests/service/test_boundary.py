"""The boundary of a service: what malformed, unknown and failing calls are answered."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qwire.errors import FieldViolation, QwireError, Reason
from qwire.service.config import ConfigError
from qwire.service.server import Listener, Server
from qwire.service.status import not_in_this_release
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc
from tests.helpers.wire import field_bytes, raw_stream, raw_unary

GENERATE = "/qwire.v1.GenerationService/Generate"
LIST_MODELS = "/qwire.v1.ModelService/ListModels"


class Models(models_pb2_grpc.ModelServiceServicer):
    async def ListModels(self, request: Any, context: Any) -> models_pb2.ListModelsResponse:
        raise RuntimeError("secret-token-123")

    async def GetModel(self, request: Any, context: Any) -> models_pb2.GetModelResponse:
        raise QwireError(grpc.StatusCode.NOT_FOUND, "no such model", reason=Reason.MODEL_NOT_FOUND, retry_after=1.5)


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(delta=pb.Delta(text=request.text))
        if request.text == "fail":
            raise RuntimeError("secret-token-123")
        if request.text == "pause":
            await asyncio.sleep(0.5)
            yield pb.GenerateResponse(delta=pb.Delta(text=request.text))
        if request.text == "flood":
            while True:
                yield pb.GenerateResponse(delta=pb.Delta(text="x" * 65536))

    async def GenerateOnce(self, request: Any, context: Any) -> Any:
        raise not_in_this_release("GenerateOnce")

    async def Embed(self, request: Any, context: Any) -> Any:
        raise not_in_this_release("Embed")

    async def Score(self, request: Any, context: Any) -> Any:
        raise not_in_this_release("Score")


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = Server(Listener("127.0.0.1:0"), max_message_bytes=1 << 20, write_timeout=0.5, announce=False)
    server.add(models_pb2_grpc.add_ModelServiceServicer_to_server, Models(), "qwire.v1.ModelService")
    server.add(generation_pb2_grpc.add_GenerationServiceServicer_to_server, Generation(), "qwire.v1.GenerationService")
    address = await server.start()
    async with grpc.aio.insecure_channel(address, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        yield channel
    await server.stop(0)


async def error_of(call: Any) -> QwireError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert "secret-token-123" not in str(caught.value)
    assert "Error'>" not in (caught.value.details() or "")
    return QwireError.from_rpc(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff",
        field_bytes(3, b"\xff\xfe"),  # text that is no UTF-8
        field_bytes(6, b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
    ],
)
async def test_malformed_bytes(channel: grpc.aio.Channel, data: bytes) -> None:
    error = await error_of(anext(aiter(raw_stream(channel, GENERATE)(data))))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.MALFORMED_MESSAGE)


async def test_unknown_fields_are_named(channel: grpc.aio.Channel) -> None:
    good = pb.GenerateRequest(text="x", stop=pb.StopOptions(max_tokens=1)).SerializeToString()
    nested = field_bytes(6, field_bytes(99, b"x"))
    message = field_bytes(5, field_bytes(1, field_bytes(98, b"y")))
    error = await error_of(anext(aiter(raw_stream(channel, GENERATE)(good + field_bytes(97, b"z")))))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.UNKNOWN_FIELD)
    assert [violation.field for violation in error.violations] == ["#97"]
    error = await error_of(anext(aiter(raw_stream(channel, GENERATE)(good + nested))))
    assert [violation.field for violation in error.violations] == ["sampling.#99"]
    error = await error_of(anext(aiter(raw_stream(channel, GENERATE)(message))))
    assert [violation.field for violation in error.violations] == ["chat.messages[0].#98"]


async def test_unknown_methods(channel: grpc.aio.Channel) -> None:
    for method in ("/qwire.v1.GenerationService/Nope", "/nope.Nope/Nope"):
        assert (await error_of(raw_unary(channel, method)(b""))).code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_failing_handler_tells_nothing_of_itself(channel: grpc.aio.Channel) -> None:
    error = await error_of(raw_unary(channel, LIST_MODELS)(b""))
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, Reason.INTERNAL)
    stream = aiter(raw_stream(channel, GENERATE)(pb.GenerateRequest(text="fail").SerializeToString()))
    await anext(stream)
    error = await error_of(anext(stream))
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, Reason.INTERNAL)


async def test_typed_errors_arrive_whole(channel: grpc.aio.Channel) -> None:
    call = raw_unary(channel, "/qwire.v1.ModelService/GetModel")(b"")
    error = await error_of(call)
    assert (error.code, error.reason, error.retry_after) == (
        grpc.StatusCode.NOT_FOUND,
        Reason.MODEL_NOT_FOUND,
        1.5,
    )
    metadata = await call.trailing_metadata()
    assert dict(metadata)["grpc-retry-pushback-ms"] == "1500"
    # Where the deadline passes first, gRPC is not to wait for it.
    call = raw_unary(channel, "/qwire.v1.ModelService/GetModel")(b"", timeout=1.2)
    assert (await error_of(call)).retry_after == 1.5
    assert dict(await call.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"


async def test_a_reader_that_stops_reading_is_cut_off(channel: grpc.aio.Channel) -> None:
    stream = raw_stream(channel, GENERATE)(pb.GenerateRequest(text="flood").SerializeToString())
    await stream.read()
    await asyncio.sleep(1.5)

    async def read_on() -> None:
        while True:
            await stream.read()

    assert (await error_of(read_on())).reason == Reason.SLOW_READER


async def test_messages_over_the_limit(channel: grpc.aio.Channel) -> None:
    error = await error_of(raw_unary(channel, LIST_MODELS)(b"x" * (2 << 20)))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_health_stays_open_and_tells_changes(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="qwire.v1.GenerationService"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(watch.read()), 0.3)
    watch.cancel()


def test_addresses_that_others_reach_are_refused() -> None:
    for address in ("0.0.0.0:1", "[::]:1", "10.1.2.3:0", "example.org:80"):
        with pytest.raises(ConfigError, match="--insecure-bind"):
            Listener(address).check()
        Listener(address, insecure_bind=True).check()
    for address in ("127.0.0.1:0", "localhost:1", "[::1]:0", "unix:/tmp/x"):
        Listener(address).check()
    for address in ("", "nonsense", "127.0.0.1:x", "127.0.0.1:99999"):
        with pytest.raises(ConfigError):
            Listener(address).check()


async def test_two_servers_never_share_an_address(tmp_path: Path) -> None:
    def server(address: str) -> Server:
        return Server(Listener(address), max_message_bytes=1, announce=False)

    first = server("127.0.0.1:0")
    address = await first.start()
    second = server(address)
    with pytest.raises(ConfigError, match="in use"):
        await second.start()
    await first.stop(0)

    path = f"unix:{tmp_path}/s"
    first = server(path)
    await first.start()
    with pytest.raises(ConfigError, match="another server"):
        await server(path).start()
    await first.stop(0)
    third = server(path)
    await third.start()
    await third.stop(0)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        await server(f"unix:{tmp_path}/file").start()
    assert (tmp_path / "file").read_text() == "precious"


async def test_calls_that_never_end_by_themselves_hold_up_no_stop() -> None:
    server = Server(Listener("127.0.0.1:0"), max_message_bytes=1 << 20, announce=False)
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        await server.set_serving(True)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        reflection: Any = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await reflection.write(b"\x3a\x00")  # list_services
        await reflection.read()
        started = time.monotonic()
        await server.stop(20)
        assert time.monotonic() - started < 10
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        error = await error_of(watch.read())
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.DRAINING)


async def test_a_stop_lets_running_streams_finish() -> None:
    server = Server(Listener("127.0.0.1:0"), max_message_bytes=1 << 20, announce=False)
    server.add(generation_pb2_grpc.add_GenerationServiceServicer_to_server, Generation(), "qwire.v1.GenerationService")
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stream = stub.Generate(pb.GenerateRequest(text="pause"))
        await anext(aiter(stream))
        await server.stop(20)
        assert [message.delta.text async for message in stream] == ["pause"]
        assert await stream.code() is grpc.StatusCode.OK


async def test_failed_calls_leave_nothing_for_the_garbage_collector(channel: grpc.aio.Channel) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            await error_of(stub.GenerateOnce(pb.GenerateOnceRequest()))
            await error_of(raw_stream(channel, GENERATE)(b"\xff\xff\xff").read())
        await asyncio.sleep(0.1)
        assert not [each for each in gc.get_objects() if type(each).__name__ == "_ServicerContext"]
    finally:
        gc.enable()


async def test_a_million_unknown_fields_are_answered_at_once(channel: grpc.aio.Channel) -> None:
    for data in (field_bytes(97, b"z") * 200_000, field_bytes(5, field_bytes(1, b"") * 200_000 + field_bytes(9, b""))):
        started = time.process_time()
        call: Any = channel.unary_stream(GENERATE)
        error = await error_of(anext(aiter(call(data))))
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.UNKNOWN_FIELD)
        assert time.process_time() - started < 1


def test_an_error_fits_the_trailers_whatever_it_says() -> None:
    violations = [FieldViolation(f"chat.messages[{n}].röle", "ü" * 2000) for n in range(500)]
    error = QwireError(
        grpc.StatusCode.INVALID_ARGUMENT, "ü" * 9000, reason=Reason.INVALID_REQUEST, violations=violations
    )
    percent_encoded = 3 * len(error.message.encode())
    assert percent_encoded + len(error.status_bytes()) * 4 / 3 < 8000
    assert error.violations
    assert error.violations[0].field == violations[0].field
