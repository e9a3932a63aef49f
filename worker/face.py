"""The worker's gRPC face: links of routers on one side, the engine on the other.

Frames to a router pass through one bounded outbox a link; the engine's thread only hands its report to the event loop
and goes on, so a router that reads slowly stalls its own link and nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Hashable
from dataclasses import replace
from typing import Any

import grpc

from qwire.errors import QwireError, Reason
from qwire.service.server import Listener, Server
from qwire.v1 import worker_pb2 as pb
from qwire.v1 import worker_pb2_grpc
from worker.cache_feed import CacheFeed
from worker.constraints.grammars import ConstraintRefused, Grammars, TooManyPending
from worker.engine.engine import Engine, NeverFits, QueueFull, StepReport
from worker.engine.sequence import Request
from worker.frames import add_report, engine_request, load_frame, prompt_logprob_frames, valid
from worker.link import Link

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

HEARTBEAT_SECONDS = 0.5
WEDGE_SECONDS = 10.0
WEDGE_FACTOR = 10.0
LONGEST_STEP_SECONDS = 600.0
"""A step is stuck once it takes longer than the first, and the second many times what steps before it say it should;
and at the latest, of an engine's first step too, after the third."""
WEDGE_LOOK_SECONDS = 0.5
MAX_SUBMIT_BYTES = 4 * 1024 * 1024
FAULT_FLUSH_SECONDS = 0.5
"""For routers to read which requests were in the step that raised."""
LAST_FRAMES_SECONDS = 1.0
"""For routers to read what is in their outboxes when the worker stops."""


class WorkerFace(worker_pb2_grpc.WorkerServiceServicer):
    """WorkerService over an engine. Built on the event loop that serves it; `attach` the engine before serving.

    Args:
        grammars: what compiles constraints; None where the model can't be held to any.
    """

    def __init__(self, info: pb.WorkerInfo, grammars: Grammars | None = None) -> None:
        self.info = info
        self._grammars = grammars
        self._compiling: set[asyncio.Task[None]] = set()
        """Submits whose constraint isn't compiled yet: at most as many as `Grammars` takes."""
        self.faulted = asyncio.Event()
        """Set once a step has raised and every router was told."""
        self._loop = asyncio.get_running_loop()
        self._links: dict[int, Link] = {}
        self._numbers = itertools.count()
        self._draining = False
        self._engine: Engine

    def attach(self, engine: Engine) -> None:
        self._engine = engine
        self._cache = CacheFeed(engine.watch_cache)

    # From the engine's thread.

    def deliver(self, report: StepReport) -> None:
        self._loop.call_soon_threadsafe(self._on_step, report)

    def fault(self, keys: list[Hashable]) -> None:
        self._loop.call_soon_threadsafe(self._on_fault, keys)

    # The service.

    async def GetWorkerInfo(self, request: pb.GetWorkerInfoRequest, context: Context) -> pb.GetWorkerInfoResponse:
        return pb.GetWorkerInfoResponse(info=self.info)

    def WatchCache(self, request: pb.WatchCacheRequest, context: Context) -> AsyncIterator[pb.WatchCacheResponse]:
        if self._draining:
            raise _draining()
        return self._cache.messages()

    async def Serve(
        self, request_iterator: AsyncIterator[pb.ServeRequest], context: Context
    ) -> AsyncIterator[pb.ServeResponse]:
        if self._draining:
            raise _draining()
        hello = await anext(request_iterator, None)
        if hello is None or hello.WhichOneof("frame") != "hello":
            raise QwireError(
                grpc.StatusCode.INVALID_ARGUMENT, "the first frame must be hello", reason=Reason.INVALID_REQUEST
            )
        link = Link(next(self._numbers), hello.hello.router_id)
        self._links[link.number] = link
        log.info("router %s linked", link.router_id)
        tasks = [
            asyncio.create_task(self._read(link, request_iterator)),
            asyncio.create_task(self._beat(link)),
        ]
        try:
            yield pb.ServeResponse(welcome=pb.Welcome(info=self.info))
            async for frame in link.frames():
                yield frame
        finally:
            del self._links[link.number]
            for task in tasks:
                task.cancel()
            self._engine.abort([(link.number, attempt) for attempt in sorted(link.live)])
            log.info("link of router %s ended, %d attempts aborted", link.router_id, len(link.live))

    async def watch_steps(self) -> None:
        """Ends the worker as a step that raises does, once one takes far longer than it should; until cancelled.

        Looks are counted rather than seconds, for a process that was stopped and woken finds its clock ahead.
        """
        step, looks = -1, 0
        while True:
            await asyncio.sleep(WEDGE_LOOK_SECONDS)
            executing, steps = self._engine.executing(), self._engine.steps
            looks = looks + 1 if executing and steps == step else 0
            step = steps
            limit = max(WEDGE_SECONDS, WEDGE_FACTOR * self._engine.predicted_seconds())
            if looks * WEDGE_LOOK_SECONDS > min(limit, LONGEST_STEP_SECONDS):
                log.critical("step %d is stuck: the process ends", steps + 1)
                self._on_fault(executing)
                return

    async def drain(self, grace: float) -> None:
        """Refuses new work, waits up to `grace` seconds for what runs, then ends all links. A fault ends it early."""
        self._draining = True
        for link in self._links.values():
            self._send_heartbeat(link)  # so that routers pick others from now on
        deadline = time.monotonic() + grace

        def busy() -> bool:
            return not self.faulted.is_set() and any(link.live for link in self._links.values())

        while busy() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await self.end_links(LAST_FRAMES_SECONDS)

    async def end_links(self, seconds: float) -> None:
        """Ends all links behind the frames that wait for their routers; these get so long to read them."""
        self._cache.end(_draining())
        for link in self._links.values():
            link.end()
        deadline = time.monotonic() + seconds
        while self._links and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def _read(self, link: Link, requests: AsyncIterator[pb.ServeRequest]) -> None:
        """Takes the router's frames until it ends the stream or breaks the rules; either ends the link."""
        try:
            async for request in requests:
                self._take(link, request)
        except Exception as error:  # whatever it is: a link that nobody reads must not stay up
            link.end(error)
        else:
            link.end()

    def _take(self, link: Link, request: pb.ServeRequest) -> None:
        match request.WhichOneof("frame"):
            case "submit":
                self._submit(link, request.submit)
            case "submits":
                link.many = True
                for submit in request.submits.submits:
                    self._submit(link, submit)
            case "abort":
                aborted = [attempt for attempt in request.abort.attempts if attempt in link.live]
                for attempt in aborted:
                    del link.live[attempt]
                self._engine.abort([(link.number, attempt) for attempt in aborted])
                for dropped in request.abort.choices:
                    if link.ended(dropped.attempt, dropped.choice):
                        self._engine.abort_choice((link.number, dropped.attempt), dropped.choice)
            case frame:
                raise QwireError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"a frame {frame or 'of no known kind'} has no place here",
                    reason=Reason.INVALID_REQUEST,
                )

    async def _beat(self, link: Link) -> None:
        while True:
            self._send_heartbeat(link)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def _send_heartbeat(self, link: Link) -> None:
        heartbeat = pb.Heartbeat(
            step_number=self._engine.steps,
            ms_in_step=round(self._engine.seconds_in_step() * 1000),
            load=load_frame(self._engine.load, link.submits_seen),
            draining=self._draining,
        )
        link.send(pb.ServeResponse(heartbeat=heartbeat))

    def _submit(self, link: Link, submit: pb.Submit) -> None:
        link.submits_seen += 1
        reason: pb.RefusedReason.ValueType | None = None
        if self._draining:
            reason = pb.REFUSED_REASON_DRAINING
        elif not valid(submit, self.info.model.vocab_size) or submit.attempt in link.live:
            reason = pb.REFUSED_REASON_INVALID
        elif len(submit.prompt_ids) + submit.params.max_tokens > self.info.model.context_length:
            reason = pb.REFUSED_REASON_TOO_LARGE
        elif submit.HasField("constraint") and self._grammars is None:
            reason = pb.REFUSED_REASON_INVALID
        if reason is not None:
            _refuse(link, submit.attempt, reason)
            return
        request = engine_request(submit, (link.number, submit.attempt))
        link.live[submit.attempt] = {index for index, choice in enumerate(submit.choices) if not choice.ended}
        if self._grammars is None or not submit.HasField("constraint"):
            self._admit(link, submit.attempt, request)
            return
        task = asyncio.create_task(self._constrain(link, submit, request, self._grammars))
        self._compiling.add(task)
        task.add_done_callback(self._compiling.discard)

    def _admit(self, link: Link, attempt: int, request: Request) -> None:
        try:
            self._engine.submit(request)
        except (QueueFull, NeverFits) as error:
            del link.live[attempt]
            full = isinstance(error, QueueFull)
            _refuse(link, attempt, pb.REFUSED_REASON_QUEUE_FULL if full else pb.REFUSED_REASON_TOO_LARGE)
        else:
            link.admitted(attempt)

    async def _constrain(self, link: Link, submit: pb.Submit, request: Request, grammars: Grammars) -> None:
        """Compiles a submit's constraint and then admits it, unless it was aborted meanwhile."""
        attempt, refused = submit.attempt, None
        try:
            states = await grammars.begin(
                submit.constraint, request.prompt_ids, request.choices, may_end=bool(request.eos_ids)
            )
            request = replace(request, constraints=states)
        except ConstraintRefused as error:
            refused = pb.Refused(reason=pb.REFUSED_REASON_CONSTRAINT, field=error.field, detail=error.detail)
        except TooManyPending:
            refused = pb.Refused(reason=pb.REFUSED_REASON_QUEUE_FULL)
        except Exception:
            log.exception("a constraint could not be compiled")
            refused = pb.Refused(reason=pb.REFUSED_REASON_INVALID)
        if self._links.get(link.number) is not link or attempt not in link.live:
            return
        if refused is not None:
            del link.live[attempt]
            _refuse(link, attempt, refused.reason, refused.field, refused.detail)
            return
        # A choice that was dropped while it was not in the engine yet.
        gone = set(range(len(request.choices))) - request.ended - link.live[attempt]
        self._admit(link, attempt, request)
        for choice in gone:
            self._engine.abort_choice(request.key, choice)

    def _on_step(self, report: StepReport) -> None:
        self._cache.take(report.snapshot, report.cache)
        frames = {
            number: pb.Step(number=report.number, load=load_frame(report.load, link.submits_seen))
            for number, link in self._links.items()
        }
        for sequence in report.sequences:
            number, attempt = _link_and_attempt(sequence.key)
            link = self._links.get(number)
            if link is None or sequence.choice not in link.live.get(attempt, ()):
                continue  # aborted while the step ran
            if sequence.start is not None:
                for frame in prompt_logprob_frames(attempt, sequence.start.prompt_scores):
                    link.send(frame)
            add_report(frames[number], attempt, sequence)
            if sequence.end is not None:
                link.ended(attempt, sequence.choice)
        for number, step in frames.items():
            self._links[number].send(pb.ServeResponse(step=step))
        for keys, reason in (
            (report.expired, pb.FAILED_REASON_DEADLINE),
            (report.too_complex, pb.FAILED_REASON_CONSTRAINT_TOO_COMPLEX),
        ):
            for key in keys:
                number, attempt = _link_and_attempt(key)
                if (link := self._links.get(number)) is not None and attempt in link.live:
                    del link.live[attempt]
                    link.send(pb.ServeResponse(failed=pb.Failed(attempt=attempt, reason=reason)))

    def _on_fault(self, keys: list[Hashable]) -> None:
        self._draining = True  # nothing runs any more; what comes until the process ends must not be admitted
        pairs = [_link_and_attempt(key) for key in keys]
        for number, link in self._links.items():
            attempts = [attempt for owner, attempt in pairs if owner == number and attempt in link.live]
            link.send(pb.ServeResponse(fault=pb.Fault(attempts=attempts)))
        self.faulted.set()


def _refuse(link: Link, attempt: int, reason: pb.RefusedReason.ValueType, field: str = "", detail: str = "") -> None:
    refused = pb.Refused(attempt=attempt, reason=reason, field=field, detail=detail)
    if reason == pb.REFUSED_REASON_QUEUE_FULL:
        refused.retry_after.FromMilliseconds(1000)
    link.send(pb.ServeResponse(refused=refused))


def _draining() -> QwireError:
    return QwireError(grpc.StatusCode.UNAVAILABLE, "the worker is shutting down", reason=Reason.DRAINING)


def _link_and_attempt(key: Hashable) -> tuple[int, int]:
    if not isinstance(key, tuple):
        raise TypeError(f"not a key of this face: {key!r}")
    number, attempt = key
    return number, attempt


def server_of(face: WorkerFace, listener: Listener, *, announce: bool = True) -> Server:
    """The server that routers link to. `announce` as of `Server`. Raises ConfigError for a listener that can't be."""
    server = Server(
        listener,
        max_message_bytes=MAX_SUBMIT_BYTES,
        announce=announce,
        options=[("grpc.keepalive_time_ms", 1_000)],  # what a router has here goes when its machine does
    )
    server.add(
        worker_pb2_grpc.add_WorkerServiceServicer_to_server,
        face,
        pb.DESCRIPTOR.services_by_name["WorkerService"].full_name,
    )
    return server
