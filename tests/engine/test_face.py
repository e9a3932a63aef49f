"""The worker's face over a real engine: what it takes from routers, and what it says when a step fails or it stops."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from qwire.errors import QwireError, Reason
from qwire.service.server import Listener, Server
from qwire.v1 import models_pb2, worker_pb2_grpc
from qwire.v1 import worker_pb2 as pb
from tests.helpers.fake_runner import FakeRunner
from worker.engine.engine import Engine
from worker.engine.plan import Drawn, StepPlan
from worker.engine.scheduler import SchedulerLimits
from worker.face import WorkerFace

FATAL_ID = 999
STUCK_ID = 998
INFO = pb.WorkerInfo(worker_id="w", model=models_pb2.ModelInfo(name="m", vocab_size=1000, context_length=100))

LinkCall = grpc.aio.StreamStreamCall[pb.ServeRequest, pb.ServeResponse]


class Runner(FakeRunner):
    """Fails or hangs where a prompt says so, and takes its time."""

    woken = threading.Event()

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        if any(STUCK_ID in chunk.token_ids for chunk in plan.chunks if chunk.start == 0):
            self.woken.wait(20)
        if any(FATAL_ID in chunk.token_ids for chunk in plan.chunks if chunk.start == 0):
            raise RuntimeError("boom")
        time.sleep(0.01)
        return super().execute(plan)


@pytest.fixture
async def face() -> AsyncIterator[WorkerFace]:
    face = WorkerFace(INFO)
    engine = Engine(
        Runner(64, 4),
        SchedulerLimits(),
        max_waiting=8,
        clock=time.monotonic,
        deliver=face.deliver,
        fault=face.fault,
    )
    face.attach(engine)
    engine.start()
    yield face
    await asyncio.to_thread(engine.stop)


@pytest.fixture
async def dial(face: WorkerFace) -> AsyncIterator[Callable[[], Awaitable[LinkCall]]]:
    server = Server(Listener("127.0.0.1:0"), max_message_bytes=1 << 20, announce=False)
    server.add(worker_pb2_grpc.add_WorkerServiceServicer_to_server, face, "qwire.v1.WorkerService")
    async with grpc.aio.insecure_channel(await server.start()) as channel:

        async def call() -> LinkCall:
            link = worker_pb2_grpc.WorkerServiceStub(channel).Serve()
            await link.write(pb.ServeRequest(hello=pb.Hello(router_id="r")))
            return link

        yield call
    await server.stop(0)


def submit_of(attempt: int, prompt: list[int], *, root: bytes = b"0123456789abcdef", **params: float) -> pb.Submit:
    values = {"top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 3, **params}
    resolved = pb.ResolvedParams(**values)  # type: ignore[arg-type]
    return pb.Submit(attempt=attempt, prompt_ids=prompt, choices=[pb.SubmitChoice()], params=resolved, prefix_root=root)


async def submit(
    link: LinkCall, attempt: int, prompt: list[int], *, root: bytes = b"0123456789abcdef", **params: float
) -> None:
    await link.write(pb.ServeRequest(submit=submit_of(attempt, prompt, root=root, **params)))


async def until(link: LinkCall, frame: str) -> pb.ServeResponse:
    async with asyncio.timeout(5):
        while True:
            response = await link.read()
            assert isinstance(response, pb.ServeResponse), "the link ended"
            if response.WhichOneof("frame") == frame:
                return response


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([], {}),
        ([1000], {}),
        ([1], {"max_tokens": 0}),
        ([1], {"temperature": math.nan}),
        ([1], {"temperature": -1.0}),
        ([1], {"temperature": math.inf}),
        ([1], {"top_p": 0.0}),
        ([1], {"top_p": math.nan}),
        ([1], {"min_p": 1.0}),
        ([1], {"root": b"short"}),
    ],
)
async def test_what_no_router_should_send_is_refused(
    dial: Callable[[], Awaitable[LinkCall]], prompt: list[int], params: dict[str, Any]
) -> None:
    link = await dial()
    await submit(link, 1, prompt, **params)
    assert (await until(link, "refused")).refused.reason == pb.REFUSED_REASON_INVALID


async def test_requests_of_one_frame_are_admitted_in_one(dial: Callable[[], Awaitable[LinkCall]]) -> None:
    link = await dial()
    frames = [submit_of(attempt, ids) for attempt, ids in ((1, [1]), (2, [1]), (3, []))]
    await link.write(pb.ServeRequest(submits=pb.Submits(submits=frames)))
    admitted = (await until(link, "admitted")).admitted
    assert (admitted.attempt, list(admitted.more)) == (1, [2])
    assert (await until(link, "refused")).refused.attempt == 3


async def test_what_is_over_the_context_is_refused(dial: Callable[[], Awaitable[LinkCall]]) -> None:
    link = await dial()
    await submit(link, 1, [1] * 90, max_tokens=11)
    assert (await until(link, "refused")).refused.reason == pb.REFUSED_REASON_TOO_LARGE
    await submit(link, 2, [1] * 90, max_tokens=10)
    await until(link, "admitted")


async def test_after_a_fault_nothing_is_admitted_and_no_drain_waits(
    face: WorkerFace, dial: Callable[[], Awaitable[LinkCall]]
) -> None:
    link = await dial()
    await submit(link, 1, [FATAL_ID])
    assert list((await until(link, "fault")).fault.attempts) == [1]
    await submit(link, 2, [1])
    assert (await until(link, "refused")).refused.reason == pb.REFUSED_REASON_DRAINING
    started = time.monotonic()
    await face.drain(20)
    assert time.monotonic() - started < 10


async def test_a_step_that_is_stuck_ends_the_worker_as_one_that_raises(
    face: WorkerFace, dial: Callable[[], Awaitable[LinkCall]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.face.WEDGE_LOOK_SECONDS", 0.05)
    monkeypatch.setattr("worker.face.WEDGE_SECONDS", 0.4)
    monkeypatch.setattr("worker.face.WEDGE_FACTOR", 0.0)
    link = await dial()
    watching = asyncio.create_task(face.watch_steps())
    await submit(link, 1, [1], max_tokens=60)
    while not (await until(link, "step")).step.sequences[0].HasField("end"):
        assert not face.faulted.is_set()
    await submit(link, 2, [STUCK_ID])
    assert list((await until(link, "fault")).fault.attempts) == [2]
    await asyncio.wait_for(watching, 5)
    assert face.faulted.is_set()
    Runner.woken.set()


async def test_choices_that_have_ended_are_not_taken(dial: Callable[[], Awaitable[LinkCall]]) -> None:
    link = await dial()
    params = pb.ResolvedParams(top_p=1.0, repetition_penalty=1.0, max_tokens=3)
    root = b"0123456789abcdef"
    ended, going = pb.SubmitChoice(generated_ids=[1] * 9, ended=True), pb.SubmitChoice(generated_ids=[4, 5])
    frame = pb.Submit(attempt=1, prompt_ids=[1], choices=[ended, ended], params=params, prefix_root=root)
    await link.write(pb.ServeRequest(submit=frame))
    assert (await until(link, "refused")).refused.reason == pb.REFUSED_REASON_INVALID
    frame = pb.Submit(attempt=2, prompt_ids=[1], choices=[ended, going], params=params, prefix_root=root)
    await link.write(pb.ServeRequest(submit=frame))
    (sequence,) = (await until(link, "step")).step.sequences
    assert (sequence.choice, sequence.token_index, sequence.HasField("start")) == (1, 2, True)


async def test_a_drain_finishes_what_runs_and_links_nobody_anew(
    face: WorkerFace, dial: Callable[[], Awaitable[LinkCall]]
) -> None:
    link = await dial()
    await submit(link, 1, [1], max_tokens=20)
    await until(link, "admitted")
    draining = asyncio.create_task(face.drain(20))
    while not (await until(link, "heartbeat")).heartbeat.draining:
        pass
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (await dial()).read()
    assert QwireError.from_rpc(caught.value).reason == Reason.DRAINING
    ids: list[int] = []
    while not (step := (await until(link, "step")).step).sequences or not step.sequences[0].HasField("end"):
        ids += [token for sequence in step.sequences for token in sequence.token_ids]
    assert len(ids) == 19
    await asyncio.wait_for(draining, 5)
    assert await link.code() is grpc.StatusCode.OK
