"""A router's link to the tokenizer service: what its failures mean to a caller."""

from __future__ import annotations

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from qwire.errors import QwireError, Reason
from router.tokenizer_link import relay


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
