"""A router's link to the tokenizer service: what its failures mean to a caller."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from qwire.errors import QwireError, Reason
from qwire.v1 import tokenizer_pb2 as pb
from qwire.v1 import tokenizer_pb2_grpc
from router.tokenizer_link import TokenizerLink, relay


@pytest.mark.parametrize(
    ("code", "answered", "reason", "again"),
    [
        (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, Reason.TOKENIZER_UNAVAILABLE, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE, False),
        # gRPC says so of a message over its limit: trying again would not make it smaller.
        (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_REQUEST, False),
    ],
)
async def test_errors_of_grpc_itself(
    code: grpc.StatusCode, answered: grpc.StatusCode, reason: Reason, again: bool
) -> None:
    async def call() -> None:
        raise AioRpcError(code, Metadata(), Metadata(), "internals")

    with pytest.raises(QwireError) as caught:
        await relay(call())
    assert (caught.value.code, caught.value.reason) == (answered, reason)
    assert (caught.value.retry_after is not None) is again
    assert "internals" not in caught.value.message


async def test_typed_errors_pass_as_they_are() -> None:
    error = QwireError(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", reason=Reason.OVERLOADED, retry_after=2.0)

    async def call() -> None:
        raise AioRpcError(error.code, Metadata(), Metadata(*error.trailing_metadata()), error.message)

    with pytest.raises(QwireError) as caught:
        await relay(call())
    assert (caught.value.reason, caught.value.retry_after) == (Reason.OVERLOADED, 2.0)


class NamedTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Encodes everything as its own number, and counts its calls."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls = 0

    async def Encode(self, request: pb.EncodeRequest, context: Any) -> pb.EncodeResponse:
        self.calls += 1
        return pb.EncodeResponse(encodings=[pb.TokenIds(ids=[self.number])])

    async def Decode(self, request: Any, context: Any) -> NoReturn:
        raise NotImplementedError

    async def RenderChat(self, request: Any, context: Any) -> NoReturn:
        raise NotImplementedError

    def Detokenize(self, request: Any, context: Any) -> NoReturn:
        raise NotImplementedError

    def GetTokenizer(self, request: Any, context: Any) -> NoReturn:
        raise NotImplementedError


async def start(servicer: NamedTokenizer) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def test_calls_take_turns_over_all_addresses_and_outlive_one() -> None:
    services = [NamedTokenizer(number) for number in range(2)]
    (first, address), (second, other) = [await start(service) for service in services]
    link = TokenizerLink(f"ipv4:{address},{other}")

    async def encode(count: int) -> list[int]:
        requests = [link.stub.Encode(pb.EncodeRequest(texts=["x"]), timeout=10) for _ in range(count)]
        return [(await relay(request)).encodings[0].ids[0] for request in requests]

    async with asyncio.timeout(10):
        while not all(service.calls for service in services):  # the second is connected a moment later
            await encode(1)
    used = await encode(20)
    assert used.count(0) == used.count(1) == 10
    await first.stop(0)
    assert set(await encode(20)) == {1}
    await link.close()
    await second.stop(0)
