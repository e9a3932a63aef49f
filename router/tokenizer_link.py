"""A router's link to the tokenizer service: unary calls, and one Detokenize stream for all sequences."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import grpc

from qwire.errors import QwireError, Reason
from qwire.service.server import LINK_OPTIONS
from qwire.v1 import tokenizer_pb2 as pb
from qwire.v1 import tokenizer_pb2_grpc
from router.journal import Journal

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Ids of a prompt take up to four times the bytes of its text, and a rendered chat carries both."""
OUTBOX_MESSAGES = 65_536
"""Messages that may wait before streams are failed. Closing a sequence is never refused: it was opened before."""
RECONNECT_SECONDS = 0.1
DIGEST_SECONDS = 1.0

_SERVICE = pb.DESCRIPTOR.services_by_name["TokenizerService"].full_name
SERVICE_CONFIG = json.dumps(
    {
        # Calls take turns over all addresses that the target resolves to; the Detokenize stream stays where it began.
        "loadBalancingConfig": [{"round_robin": {}}],
        # A service that dies takes the calls with it that were just sent there. They change nothing: another may have
        # them. Calls over gRPC's retry buffer of 256 KiB aren't tried again.
        "methodConfig": [
            {
                "name": [{"service": _SERVICE, "method": method} for method in ("Encode", "Decode", "RenderChat")],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.02s",
                    "maxBackoff": "0.2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)


class TokenizerLink:
    """The tokenizer service at `target`, or several at all the addresses that it resolves to, such as
    `ipv4:10.0.0.1:50071,10.0.0.2:50071`. `run` keeps the Detokenize stream up."""

    def __init__(self, target: str) -> None:
        options = [
            *LINK_OPTIONS,
            ("grpc.service_config", SERVICE_CONFIG),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self.channel = grpc.aio.insecure_channel(target, options=options)
        self.stub = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)
        self._target = target
        self._journals: dict[int, Journal] = {}
        """By the sequences of their choices."""
        self._outbox: asyncio.Queue[pb.DetokenizeRequest | None] | None = None

    async def digest(self, model: str) -> str | None:
        """Of a model's tokenizer; empty where the service has no such model, None where it can't be asked."""
        try:
            call = self.stub.GetTokenizer(pb.GetTokenizerRequest(model=model), timeout=DIGEST_SECONDS)
            async for message in call:
                return message.info.digest
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return ""
        return None

    async def run(self) -> None:
        """Opens the Detokenize stream, and again whenever it ends, until cancelled."""
        while True:
            outbox = self._outbox = asyncio.Queue()
            for journal in dict.fromkeys(self._journals.values()):
                self.send(journal.open_requests())
            try:
                async for response in self.stub.Detokenize(self._requests(outbox), wait_for_ready=True):
                    for piece in response.pieces:
                        if (journal_or_none := self._journals.get(piece.sequence)) is not None:
                            journal_or_none.take_piece(piece)
            except grpc.aio.AioRpcError as error:
                log.warning("detokenize stream to %s ended: %s", self._target, error.code().name)
            self._outbox = None
            outbox.put_nowait(None)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def close(self) -> None:
        await self.channel.close()

    def open(self, journal: Journal) -> None:
        """Starts a sequence for each choice; should the stream be opened again, they go on where their text stands."""
        self._journals.update(dict.fromkeys(journal.sequences, journal))
        self.send(journal.open_requests())

    def release(self, journal: Journal) -> None:
        """Forgets a journal's sequences."""
        known = [sequence for sequence in journal.sequences if self._journals.pop(sequence, None) is not None]
        if known:
            self.send([pb.DetokenizeRequest(close=pb.DetokenizeClose(sequence=sequence)) for sequence in known])

    def send(self, requests: list[pb.DetokenizeRequest]) -> None:
        """Sends requests in order as one message. While the stream is down they are dropped: opening it again sends
        the state of every sequence."""
        if self._outbox is None:
            return
        if self._outbox.qsize() < OUTBOX_MESSAGES or all(request.HasField("close") for request in requests):
            self._outbox.put_nowait(pb.DetokenizeRequest(batch=pb.DetokenizeBatch(requests=requests)))
            return
        for request in requests:
            sequence = request.open.sequence or request.push.sequence
            if (journal := self._journals.get(sequence)) is not None:
                journal.fail(tokenizer_unavailable())

    async def _requests(
        self, outbox: asyncio.Queue[pb.DetokenizeRequest | None]
    ) -> AsyncIterator[pb.DetokenizeRequest]:
        while (request := await outbox.get()) is not None:  # None ends grpc's task that would wait here for ever
            yield request


async def relay(call: Awaitable[T]) -> T:
    """Awaits a call of the tokenizer service, and raises its error as ours: typed ones as they are."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        failed = QwireError.from_rpc(error)
        if failed.reason:
            raise failed from None
        if failed.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise QwireError(failed.code, "the deadline passed", reason=Reason.DEADLINE) from None
        if failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own answer to a message over the limit
            raise QwireError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"the request or its answer is over {MAX_MESSAGE_BYTES} bytes between router and tokenizer service",
                reason=Reason.INVALID_REQUEST,
            ) from None
        raise tokenizer_unavailable() from None


def tokenizer_unavailable() -> QwireError:
    return QwireError(
        grpc.StatusCode.UNAVAILABLE,
        "the tokenizer service can't be reached",
        reason=Reason.TOKENIZER_UNAVAILABLE,
        retry_after=1.0,
    )
