"""A router's link to a worker: what it takes on it can give back, and one stream's end is never another's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
import pytest

from qwire.errors import QwireError, Reason
from qwire.service.server import Listener, Server
from qwire.v1 import generation_pb2, models_pb2, worker_pb2_grpc
from qwire.v1 import worker_pb2 as pb
from router import worker_link
from router.choice import OutputSpec
from router.journal import Journal, Why
from router.worker_link import WorkerLink

INFO = pb.WorkerInfo(worker_id="w", model=models_pb2.ModelInfo(name="m"))


class ScriptedWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Says what it is told to say; keeps what it is told."""

    def __init__(self) -> None:
        self.say: asyncio.Queue[pb.ServeResponse | None] = asyncio.Queue()
        self.heard: asyncio.Queue[pb.ServeRequest] = asyncio.Queue()

    async def Serve(self, requests: AsyncIterator[pb.ServeRequest], context: Any) -> AsyncIterator[pb.ServeResponse]:
        reader = asyncio.create_task(self._read(requests))
        try:
            yield pb.ServeResponse(welcome=pb.Welcome(info=INFO))
            while (frame := await self.say.get()) is not None:
                yield frame
        finally:
            reader.cancel()

    async def GetWorkerInfo(self, request: Any, context: Any) -> NoReturn:
        raise NotImplementedError

    def WatchCache(self, request: Any, context: Any) -> NoReturn:
        raise NotImplementedError

    async def _read(self, requests: AsyncIterator[pb.ServeRequest]) -> None:
        async for request in requests:
            if not request.HasField("hello"):
                self.heard.put_nowait(request)


@pytest.fixture
async def worker() -> ScriptedWorker:
    return ScriptedWorker()


@pytest.fixture
async def link(worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WorkerLink]:
    monkeypatch.setattr(worker_link, "SILENT_LOOKS", 1000)  # the script has no heartbeats
    server = Server(Listener("127.0.0.1:0"), max_message_bytes=1 << 20, announce=False)
    server.add(worker_pb2_grpc.add_WorkerServiceServicer_to_server, worker, "qwire.v1.WorkerService")
    link = WorkerLink(await server.start(), "r", lambda requests: None)
    running = asyncio.create_task(link.run())
    while not link.ready:
        await asyncio.wait_for(link.changed.wait(), 5)
    yield link
    running.cancel()
    await server.stop(0)


def journal(pending: int = 4096) -> Journal:
    spec = OutputSpec(generation_pb2.StopOptions(max_tokens=99), False, True, pending)
    return Journal(spec, range(7, 8), 3, 0.0, lambda: 1.0)


def step(attempt: int, index: int) -> pb.ServeResponse:
    sequence = pb.SequenceStep(attempt=attempt, token_index=index, token_ids=[1])
    return pb.ServeResponse(step=pb.Step(sequences=[sequence]))


async def test_a_reader_that_stops_reading_costs_its_neighbours_nothing(
    link: WorkerLink, worker: ScriptedWorker
) -> None:
    slow, neighbour = journal(pending=2), journal()
    first, second = link.submit(slow, pb.Submit()), link.submit(neighbour, pb.Submit())
    for index in range(10):  # the slow stream is over at the third and released at the end, as by a stuck handler
        worker.say.put_nowait(step(first, index))
    worker.say.put_nowait(step(second, 0))
    (delta,) = await asyncio.wait_for(neighbour.next_messages(), 5)
    assert list(delta.delta.token_ids) == [1]
    await slow.next_messages()
    with pytest.raises(QwireError) as caught:
        await slow.next_messages()
    assert caught.value.reason == Reason.SLOW_READER


async def test_a_submit_that_finds_the_outbox_full_holds_nothing_and_aborts_still_go_out(
    link: WorkerLink, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = link.submit(journal(), pb.Submit())
    monkeypatch.setattr(worker_link, "OUTBOX_FRAMES", 1)
    with pytest.raises(QwireError) as caught:
        link.submit(journal(), pb.Submit())
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
    assert link.streams == 1
    link.release(attempt, finished=False)
    assert link.streams == 0
    frames = [(await asyncio.wait_for(worker.heard.get(), 5)).WhichOneof("frame") for _ in range(2)]
    assert frames == ["submit", "abort"]


async def test_submits_that_wait_together_are_one_frame_and_none_passes_an_abort(
    link: WorkerLink, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_link, "SUBMITS_BYTES", 100)
    assert link.info is not None
    link.info.features.append(pb.FEATURE_SUBMITS)
    long = [pb.Submit(prompt_ids=[1] * ids) for ids in (30, 30, 60, 500, 10)]
    first = [link.submit(journal(), submit) for submit in long]
    link.release(first[0], finished=False)
    last = [link.submit(journal(), pb.Submit()) for _ in range(3)]
    heard: list[object] = []
    for _ in range(6):
        frame = await asyncio.wait_for(worker.heard.get(), 5)
        match frame.WhichOneof("frame"):
            case "submit":
                heard.append(frame.submit.attempt)
            case "submits":
                heard.append([submit.attempt for submit in frame.submits.submits])
            case "abort":
                heard.append("abort")
    assert heard == [first[:2], *first[2:], "abort", last]
    worker.say.put_nowait(pb.ServeResponse(admitted=pb.Admitted(attempt=last[0], more=last[1:])))
    for attempt in last:
        await asyncio.wait_for(link._journals[attempt].admitted, 5)


async def test_a_worker_that_reads_no_submits_gets_one_a_frame(link: WorkerLink, worker: ScriptedWorker) -> None:
    attempts = [link.submit(journal(), pb.Submit()) for _ in range(3)]
    heard = [await asyncio.wait_for(worker.heard.get(), 5) for _ in attempts]
    assert [frame.submit.attempt for frame in heard] == attempts


async def test_a_worker_that_drains_is_not_picked_again_and_finishes_what_it_has(
    link: WorkerLink, worker: ScriptedWorker
) -> None:
    running, late = journal(), journal()
    first, second = link.submit(running, pb.Submit()), link.submit(late, pb.Submit())
    refused = pb.Refused(attempt=second, reason=pb.REFUSED_REASON_DRAINING)
    worker.say.put_nowait(pb.ServeResponse(refused=refused))
    lost = await asyncio.wait_for(late.lost, 5)
    assert (lost.why, lost.error.reason) == (Why.REFUSED, Reason.DRAINING)
    assert not link.ready
    worker.say.put_nowait(step(first, 0))
    assert await asyncio.wait_for(running.next_messages(), 5)
    link.release(first, finished=False)
    frames = [(await asyncio.wait_for(worker.heard.get(), 5)).WhichOneof("frame") for _ in range(3)]
    assert frames == ["submit", "submit", "abort"]


async def test_a_worker_that_says_so_before_it_drains_is_not_picked_again(
    link: WorkerLink, worker: ScriptedWorker
) -> None:
    running = journal()
    first = link.submit(running, pb.Submit())
    worker.say.put_nowait(pb.ServeResponse(heartbeat=pb.Heartbeat(draining=True)))
    while link.ready:
        await asyncio.wait_for(link.changed.wait(), 5)
    worker.say.put_nowait(step(first, 0))
    assert await asyncio.wait_for(running.next_messages(), 5)
    assert not running.lost.done()


async def test_a_silent_worker_is_given_up_and_linked_again(
    link: WorkerLink, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = journal()
    link.submit(stuck, pb.Submit())
    monkeypatch.setattr(worker_link, "SILENT_LOOKS", 2)
    lost = await asyncio.wait_for(stuck.lost, 5)
    assert (lost.why, lost.error.reason) == (Why.LOST, Reason.WORKER_LOST)
    monkeypatch.setattr(worker_link, "SILENT_LOOKS", 1000)
    while not link.ready:
        await asyncio.wait_for(link.changed.wait(), 5)


async def test_a_gap_in_the_indexes_ends_the_link_and_what_was_there_stands(
    link: WorkerLink, worker: ScriptedWorker
) -> None:
    broken, neighbour = journal(), journal()
    first, second = link.submit(broken, pb.Submit()), link.submit(neighbour, pb.Submit())
    worker.say.put_nowait(step(first, 0))
    worker.say.put_nowait(step(first, 2))
    worker.say.put_nowait(step(second, 0))
    for stream in (broken, neighbour):
        assert (await asyncio.wait_for(stream.lost, 5)).why is Why.LOST
    assert (list(broken.choices[0].ids), list(neighbour.choices[0].ids)) == ([1], [])


async def test_a_fault_names_suspects_and_loses_all(link: WorkerLink, worker: ScriptedWorker) -> None:
    suspect, queued = journal(), journal()
    first = link.submit(suspect, pb.Submit())
    link.submit(queued, pb.Submit())
    worker.say.put_nowait(pb.ServeResponse(fault=pb.Fault(attempts=[first])))
    assert (await asyncio.wait_for(suspect.lost, 5)).why is Why.FAULT
    assert (await asyncio.wait_for(queued.lost, 5)).why is Why.LOST
    assert (link.ready, link.streams) == (False, 0)


async def test_attempts_of_all_links_are_told_apart(link: WorkerLink) -> None:
    other = WorkerLink("elsewhere", "r", lambda requests: None)
    other.info, other.ready = INFO, True
    assert (
        link.submit(journal(), pb.Submit()) < other.submit(journal(), pb.Submit()) < link.submit(journal(), pb.Submit())
    )


async def test_nothing_waits_behind_after_a_link_has_ended(link: WorkerLink, worker: ScriptedWorker) -> None:
    def waiting() -> int:
        return sum("_consume_request_iterator" in repr(task) for task in asyncio.all_tasks())

    assert waiting() == 1
    for _ in range(3):
        worker.say.put_nowait(None)
        while link.ready:
            await asyncio.wait_for(link.changed.wait(), 5)
        while not link.ready:
            await asyncio.wait_for(link.changed.wait(), 5)
    assert waiting() == 1
