"""A request's way through workers: what makes it move, where it may go, and when it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from qwire.errors import QwireError, Reason
from qwire.v1 import generation_pb2, models_pb2
from qwire.v1 import worker_pb2 as pb
from router.admission import Wanted
from router.choice import OutputSpec
from router.dispatch import Dispatch, Work
from router.fleet import Fleet
from router.journal import Journal
from router.placement import POLICIES
from router.worker_link import WorkerLink

TASKS: set[asyncio.Task[None]] = set()


def make_link(number: int, numerics: str = "x") -> WorkerLink:
    link = WorkerLink(f"target-{number}", "r", lambda requests: None)
    model = models_pb2.ModelInfo(name="m", numerics_id=numerics)
    link.info = pb.WorkerInfo(worker_id=f"w{number}", model=model, block_size=16, max_running=4, max_waiting=4)
    link.ready = True
    return link


class Queue:
    """A queue with one place, whose turn comes when the test says so."""

    def __init__(self) -> None:
        self.wanted: list[Wanted] = []
        self.open = asyncio.Event()
        self.open.set()

    async def wait(self, wanted: Wanted) -> None:
        self.wanted.append(wanted)
        await self.open.wait()

    def placed(self, uncached_tokens: int) -> None:
        pass

    def put_back(self) -> None:
        self.open.clear()


class Stream:
    """One request over some links, whose workers the test plays."""

    def __init__(
        self, *links: WorkerLink, choices: int = 1, wait: float = 0.0, moves: int = 5, best_effort: bool = False
    ) -> None:
        self.links = links
        self.queue = Queue()
        spec = OutputSpec(generation_pb2.StopOptions(max_tokens=99), False, True, 4096)
        self.journal = Journal(spec, range(choices), 3, 0.0, lambda: 1.0)
        work = Work("m", [1, 2, 3], pb.ResolvedParams(seed=7), b"s" * 16, False, best_effort, time.monotonic())
        self.dispatch = Dispatch(work, self.journal, Fleet(list(links), wait, POLICIES["prefix"]), moves, self.queue)
        self.task = asyncio.create_task(self.dispatch.run())
        TASKS.add(self.task)

    async def submitted(self) -> tuple[WorkerLink, pb.Submit]:
        """The next attempt, wherever it is."""
        async with asyncio.timeout(5):
            while True:
                for link in self.links:
                    while not link._outbox.empty():
                        item = link._outbox.get_nowait()
                        if item is not None and not isinstance(item, pb.Abort):
                            return link, item.write().submit
                await asyncio.sleep(0)

    async def error(self) -> QwireError:
        await asyncio.wait_for(self.task, 5)
        assert self.journal._error is not None
        return self.journal._error


def admit(link: WorkerLink, submit: pb.Submit) -> None:
    link._take(pb.ServeResponse(admitted=pb.Admitted(attempt=submit.attempt)))


def refuse(link: WorkerLink, submit: pb.Submit, reason: pb.RefusedReason.ValueType) -> None:
    link._take(pb.ServeResponse(refused=pb.Refused(attempt=submit.attempt, reason=reason)))


def bring(link: WorkerLink, submit: pb.Submit, index: int, ids: list[int], choice: int = 0, **more: object) -> None:
    sequence = pb.SequenceStep(
        attempt=submit.attempt,
        choice=choice,
        token_index=index,
        token_ids=ids,
        **more,  # type: ignore[arg-type]
    )
    link._take(pb.ServeResponse(step=pb.Step(sequences=[sequence])))


def fault(link: WorkerLink, submit: pb.Submit) -> None:
    link._take(pb.ServeResponse(fault=pb.Fault(attempts=[submit.attempt])))
    link.ready = True  # it was started again


@pytest.fixture(autouse=True)
async def cancelled() -> AsyncIterator[None]:
    yield
    for task in TASKS:
        task.cancel()
    TASKS.clear()


async def test_a_lost_stream_goes_on_from_its_ids_and_what_the_old_worker_still_says_is_dropped() -> None:
    stream = Stream(make_link(0), make_link(1))
    first, submit = await stream.submitted()
    assert (submit.moved, submit.suspect, list(submit.choices)) == (False, False, [pb.SubmitChoice()])
    admit(first, submit)
    bring(first, submit, 0, [5, 6], start=pb.SequenceStart(cached_tokens=1))
    first._lose()
    second, again = await stream.submitted()
    assert second is not first
    assert (list(again.prompt_ids), list(again.choices[0].generated_ids)) == ([1, 2, 3], [5, 6])
    assert (again.moved, again.suspect, again.params) == (True, False, submit.params)
    first.ready = True
    bring(first, submit, 2, [666])
    bring(second, again, 2, [7], start=pb.SequenceStart(cached_tokens=2))
    end = pb.SequenceEnd(reason=pb.END_REASON_LENGTH)
    bring(second, again, 3, [8], end=end)
    delta, finished = await stream.journal.next_messages()
    assert list(delta.delta.token_ids) == [5, 6, 7, 8]
    assert finished.finished.usage == generation_pb2.Usage(prompt_tokens=3, cached_tokens=1, generated_tokens=4)
    placement = generation_pb2.Placement(worker=second.info.worker_id if second.info else "", moves=1, exact=True)
    placement.recomputed_tokens = 2 + 3 - 2
    assert finished.finished.placement == placement
    assert not stream.journal.needs_worker


async def test_choices_that_are_done_are_not_sent_along_and_a_stream_that_is_done_stays() -> None:
    stream = Stream(make_link(0), make_link(1), choices=3)
    first, submit = await stream.submitted()
    end = pb.SequenceEnd(reason=pb.END_REASON_EOS)
    bring(first, submit, 0, [5], choice=0, end=end)
    bring(first, submit, 0, [6], choice=1)
    first._lose()
    second, again = await stream.submitted()
    assert [choice.ended for choice in again.choices] == [True, False, False]
    assert [list(choice.generated_ids) for choice in again.choices] == [[], [6], []]
    bring(second, again, 1, [2], choice=1, end=end)
    bring(second, again, 0, [2], choice=2, end=end)
    second._lose()
    await asyncio.wait_for(stream.task, 5)
    assert (stream.journal.moves, stream.journal.finished) == (1, False)
    assert len(await stream.journal.next_messages()) == 6


async def test_what_full_workers_refuse_waits_until_one_has_room() -> None:
    stream = Stream(make_link(0), make_link(1))
    first, submit = await stream.submitted()
    refuse(first, submit, pb.REFUSED_REASON_QUEUE_FULL)
    assert (first.room, first.full) == (0, True)
    await asyncio.sleep(0)
    stream.queue.open.set()
    second, again = await stream.submitted()
    assert (second is not first, again.moved) == (True, False)
    refuse(second, again, pb.REFUSED_REASON_QUEUE_FULL)
    for _ in range(3):
        await asyncio.sleep(0)
        stream.queue.open.set()  # its turn comes, and there is no room after all
    assert not stream.task.done()
    first._take(pb.ServeResponse(heartbeat=pb.Heartbeat(load=pb.Load(waiting=4))))
    assert first.full
    first._take(pb.ServeResponse(heartbeat=pb.Heartbeat(load=pb.Load(waiting=3))))
    assert first.room == 8
    stream.queue.open.set()
    third, _ = await stream.submitted()
    assert third is first
    assert stream.queue.wanted[0] == Wanted("m")


async def test_a_stream_that_moves_needs_no_turn() -> None:
    stream = Stream(make_link(0), make_link(1))
    first, submit = await stream.submitted()
    admit(first, submit)
    stream.queue.open.clear()
    first._lose()
    _, again = await stream.submitted()
    assert (again.moved, len(stream.queue.wanted)) == (True, 1)


async def test_a_draining_worker_is_waited_out() -> None:
    stream = Stream(make_link(0), wait=5)
    first, submit = await stream.submitted()
    refuse(first, submit, pb.REFUSED_REASON_DRAINING)
    await asyncio.sleep(0)
    first._set_ready(True)
    _, again = await stream.submitted()
    assert (again.moved, stream.journal.moves) == (False, 0)


async def test_a_stream_moves_so_often_and_no_more() -> None:
    stream = Stream(make_link(0), make_link(1), moves=2)
    for number in range(3):
        link, submit = await stream.submitted()
        bring(link, submit, number, [number])
        link._lose()
        link.ready = True
    error = await stream.error()
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.WORKER_LOST)


async def test_two_faults_without_a_token_between_them_end_a_request() -> None:
    stream = Stream(make_link(0), make_link(1))
    link, submit = await stream.submitted()
    bring(link, submit, 0, [5])
    fault(link, submit)
    link, submit = await stream.submitted()
    assert submit.suspect
    fault(link, submit)
    error = await stream.error()
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, Reason.REQUEST_FAULTS_WORKER)


async def test_a_neighbour_of_what_faults_is_cleared_by_its_next_token() -> None:
    stream = Stream(make_link(0), make_link(1))
    for index in range(3):
        link, submit = await stream.submitted()
        assert submit.suspect == (index > 0)
        bring(link, submit, index, [index])
        fault(link, submit)
    link, submit = await stream.submitted()
    link._lose()  # lost without a fault: it is as suspect as it was
    _, submit = await stream.submitted()
    assert submit.suspect
    assert stream.journal.needs_worker


async def test_what_a_client_was_told_of_numerics_is_kept() -> None:
    stream = Stream(make_link(0, "x"), make_link(1, "y"))
    first, submit = await stream.submitted()
    admit(first, submit)
    first._lose()
    error = await stream.error()
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.NO_EQUIVALENT_WORKER)
    assert error.retry_after is not None


async def test_before_that_any_numerics_will_do() -> None:
    stream = Stream(make_link(0, "x"), make_link(1, "y"))
    first, _ = await stream.submitted()
    assert stream.dispatch.numerics_id == "x"
    first._lose()
    await stream.submitted()
    assert (stream.dispatch.numerics_id, stream.journal.exact) == ("y", True)


async def test_best_effort_goes_on_with_other_numerics_and_says_so() -> None:
    stream = Stream(make_link(0, "x"), make_link(1, "y"), best_effort=True)
    first, submit = await stream.submitted()
    admit(first, submit)
    bring(first, submit, 0, [5])
    first._lose()
    second, again = await stream.submitted()
    bring(second, again, 1, [6], end=pb.SequenceEnd(reason=pb.END_REASON_EOS))
    *_, finished = await stream.journal.next_messages()
    assert not finished.finished.placement.exact


async def test_release_stops_what_runs_and_only_once() -> None:
    stream = Stream(make_link(0))
    link, submit = await stream.submitted()
    stream.task.cancel()
    for _ in range(2):
        stream.dispatch.release()
    abort = link._outbox.get_nowait()
    assert isinstance(abort, pb.Abort) and list(abort.attempts) == [submit.attempt]
    assert link._outbox.empty()
    assert link.streams == 0


async def test_a_bug_ends_the_stream_rather_than_leave_it_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Dispatch, place: object) -> pb.Submit:
        raise ValueError("secret")

    monkeypatch.setattr(Dispatch, "_submit", broken)
    error = await Stream(make_link(0)).error()
    assert (error.code, "secret" in error.message) == (grpc.StatusCode.INTERNAL, False)
