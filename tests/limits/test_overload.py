"""Ten times what the workers can do, from callers that come again at once: those that are taken keep their pace, those
that aren't hear it typed, and nothing grows. The workers have no model. A longer form: benchmarks/overload.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import grpc
import pytest

from qwire import AsyncClient, QwireError, Reason
from qwire.errors import DETAILS_KEY, PUSHBACK_KEY
from qwire.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc
from qwire.v1 import generation_pb2 as pb
from tests.helpers.fleets import Fleet, fake_fleet
from worker.fake import continuation

VOCAB = 32_000
TOKENS = 20
RUNNING, WAITING, QUEUED = 4, 1, 4
CALLERS = 60
"""Of which nine can be served or wait."""
SECONDS = 4.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fake_fleet(
        tmp_path_factory.mktemp("overload"),
        workers=1,
        worker_flags=("--step-ms", "10", "--max-running", str(RUNNING), "--max-waiting", str(WAITING)),
        router_flags=("--max-queued", str(QUEUED)),
    ) as fleet:
        yield fleet


def request(number: int) -> pb.GenerateRequest:
    request = pb.GenerateRequest(stop=pb.StopOptions(max_tokens=TOKENS, ignore_eos=True))
    request.token_ids.ids.extend([number % 100, 1])
    request.output.text = False
    request.sampling.temperature = 0
    return request


class Storm:
    """Callers that ask again and again, whatever the answer is."""

    def __init__(self, stub: generation_pb2_grpc.GenerationServiceAsyncStub) -> None:
        self.served = 0
        self.refused = 0
        self._stub = stub

    async def call(self, number: int, until: float) -> None:
        while time.monotonic() < until:
            call = self._stub.Generate(request(number))
            ids: list[int] = []
            try:
                async for message in call:
                    ids += message.delta.token_ids
            except grpc.aio.AioRpcError as error:
                refusal = QwireError.from_rpc(error)
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
                assert refusal.retry_after is not None and refusal.retry_after > 0
                assert {DETAILS_KEY, PUSHBACK_KEY} <= {key for key, _ in await call.trailing_metadata()}
                assert not ids
                self.refused += 1
                await asyncio.sleep(0.02)
            else:
                assert ids == continuation([number % 100, 1], TOKENS, VOCAB)
                self.served += 1


async def test_a_storm_of_retries(fleet: Fleet) -> None:
    router = fleet.services["router-0"]

    async def state() -> admin_pb2.GetStateResponse:
        async with grpc.aio.insecure_channel(f"unix:{fleet.folder}/admin-0.sock") as channel:
            return await admin_pb2_grpc.AdminServiceStub(channel).GetState(admin_pb2.GetStateRequest())

    async def watch(until: float) -> int:
        most = 0
        while time.monotonic() < until:
            now = await state()
            assert now.active_streams <= RUNNING + WAITING + QUEUED
            most = max(most, now.requests_queued)
            await asyncio.sleep(0.05)
        return most

    async with grpc.aio.insecure_channel(router.address) as channel, AsyncClient(router.address) as polite:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        peak = Storm(stub)
        until = time.monotonic() + SECONDS / 2
        await asyncio.gather(*(peak.call(number, until) for number in range(RUNNING + WAITING)))
        assert not peak.refused

        storm, memory = Storm(stub), router.memory
        until = time.monotonic() + SECONDS
        callers = [storm.call(number, until) for number in range(CALLERS)]
        # One that goes by the published service config gets through in the midst of it: refusals are no failures that
        # would have it give up.
        asked = asyncio.create_task(polite.generate_once(token_ids=[3, 1], max_tokens=1, priority=10, text=False))
        _, most = await asyncio.gather(asyncio.gather(*callers), watch(until))
        print(f"served {peak.served} in {SECONDS / 2:g} s, then {storm.served} and {storm.refused} refused")
        assert storm.refused > 2 * storm.served > 0
        assert 0 < most <= QUEUED + RUNNING + WAITING  # some of which only pass through
        assert router.memory - memory < 64 * 1024 * 1024
        try:
            await asked
        except QwireError as error:
            assert error.reason == Reason.OVERLOADED  # unlucky at all of its tries, and told so  # noqa: PT017
        # Back to normal at once: whoever asks now is served.
        after = Storm(stub)
        await after.call(1, time.monotonic() + 0.2)
        assert (after.served > 0, after.refused) == (True, 0)
        while (now := await state()).active_streams:
            await asyncio.sleep(0.02)
        assert (now.requests_queued, now.queued_tokens, now.requests_running) == (0, 0, 0)
        assert now.requests_refused >= storm.refused
