"""A router's link to one worker: a `Serve` stream that is opened again whenever it ends.

The link knows attempts, not requests: it hands each frame to the journal that its attempt belongs to, and forgets an
attempt once told to, or once it is over. Frames of attempts that it doesn't know are dropped, and a call that was given
up is never read again, which is what fences off the past.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from qwire.errors import FieldViolation, QwireError, Reason
from qwire.service.server import LINK_OPTIONS
from qwire.v1 import tokenizer_pb2, worker_pb2_grpc
from qwire.v1 import worker_pb2 as pb
from router.cache_index import CacheIndex
from router.choice import IndexGap
from router.journal import Journal, Lost, Why

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 4 * 1024 * 1024
OUTBOX_FRAMES = 4096
"""Frames that may wait for the worker before submits are refused."""
SUBMITS_BYTES = 64 * 1024
"""Of a frame in which several submits go that waited together: most of what one costs isn't what it holds."""
SILENCE_LOOK_SECONDS = 0.25
SILENT_LOOKS = 8
"""A worker of which nothing was heard over so many looks is lost: its heartbeats are half a second apart. Looks are
counted rather than seconds, for a router that was stopped itself has not read yet what came meanwhile."""
UNWELCOMED_LOOKS = 20
"""The same until its Welcome: connecting takes longer."""
RECONNECT_SECONDS = (0.05, 0.5)
"""The shortest and the longest pause before a link is tried again."""
RECONNECT_SHARE = 0.05
"""Within those, the pause as a part of how long the link has been down: what it adds to that at most."""
WORKER_REFUSED_RETRY_SECONDS = 1.0
LOST_RETRY_SECONDS = 1.0


class _KeptOut(Exception):
    """The worker is not to be used; says why."""


class _Submits:
    """Submits that wait for the worker, to be written in one frame."""

    __slots__ = ("_bytes", "_submits", "_written")

    def __init__(self, first: pb.Submit) -> None:
        self._submits = [first]
        self._bytes = first.ByteSize()
        self._written = False

    def take(self, submit: pb.Submit) -> bool:
        """Takes in one more, unless it is full or written."""
        self._bytes += submit.ByteSize()
        if self._written or self._bytes > SUBMITS_BYTES:
            return False
        self._submits.append(submit)
        return True

    def write(self) -> pb.ServeRequest:
        """The frame."""
        self._written = True
        if len(self._submits) == 1:
            return pb.ServeRequest(submit=self._submits[0])
        frame = pb.ServeRequest()
        frame.submits.submits.extend(self._submits)
        return frame


class WorkerLink:
    """The link to the worker at `target`. `run` keeps it up; `ready` says whether requests can be placed."""

    _attempts = itertools.count(1)
    """Of all links: with the router's id a number names one attempt for ever."""

    def __init__(
        self,
        target: str,
        router_id: str,
        detokenize: Callable[[list[tokenizer_pb2.DetokenizeRequest]], None],
        cache: CacheIndex | None = None,
    ) -> None:
        self.target = target
        self.info: pb.WorkerInfo | None = None
        """What the worker said of itself when last linked."""
        self.load = pb.Load()
        self.cache = CacheIndex() if cache is None else cache  # an empty one is false
        """What its prefix cache holds."""
        self.ready = False
        self.changed = asyncio.Event()
        """Set, and replaced, whenever `ready` changes."""
        self.on_room: Callable[[], None] = lambda: None
        """Called whenever there may be room for another request, or `ready` has changed."""
        self._saturated = False
        """Whether the worker has refused one since it last reported its load: others fill it too."""
        self._down_since = time.monotonic()
        self.kept_out = ""
        """Why the worker there isn't used, if it isn't."""
        self.object: Callable[[pb.WorkerInfo], Awaitable[str]] = _no_objection
        """Says why a worker is to be kept out; empty if it isn't."""
        self._silent_looks = 0
        self._router_id = router_id
        self._detokenize = detokenize
        self._journals: dict[int, Journal] = {}
        self._uncomputed: dict[int, int] = {}
        """Prompt tokens of those attempts that haven't got their first token."""
        # Not bounded by itself, so that an abort is never lost: there is one at most for each submit, and those are.
        self._outbox: asyncio.Queue[_Submits | pb.Abort | None] = asyncio.Queue()
        self._last: _Submits | None = None
        """What the outbox ends with, where that is submits."""

    @property
    def streams(self) -> int:
        """How many requests are placed here."""
        return len(self._journals)

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens of those that are still to be computed."""
        return sum(self._uncomputed.values())

    @property
    def room(self) -> int:
        """How many more requests the worker takes, as far as the router knows."""
        if self.info is None or self._saturated or self._outbox.qsize() >= OUTBOX_FRAMES:
            return 0
        return max(0, self.info.max_running + self.info.max_waiting - self.streams)

    @property
    def full(self) -> bool:
        """Whether as many are placed here as the worker runs and lets wait."""
        return self.info is not None and not self.room

    async def run(self) -> None:
        """Links, and links again, until cancelled."""
        failures = 0
        while True:
            options = [
                *LINK_OPTIONS,
                ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
                ("grpc.use_local_subchannel_pool", 1),  # or a new channel may wait for an old one's connection
            ]
            async with grpc.aio.insecure_channel(self.target, options=options) as channel:
                stub = worker_pb2_grpc.WorkerServiceStub(channel)
                watch = asyncio.create_task(self.cache.follow(stub))
                try:
                    await self._serve(stub)
                except _KeptOut as error:
                    self._keep_out(str(error))
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                        self._keep_out("it is no worker: it has another protocol")
                    elif self.ready or failures == 0:
                        log.warning("link to %s ended: %s", self.target, error.code().name)
                except TimeoutError:
                    if self.ready or failures == 0:
                        log.warning("nothing is heard of the worker at %s: it is given up", self.target)
                except IndexGap as error:
                    log.error("link to %s broken by the worker: %s", self.target, error)
                finally:
                    watch.cancel()
                await asyncio.wait([watch])
                if not watch.cancelled():
                    watch.result()
            failures = 0 if self.ready else failures + 1
            self._lose()
            shortest, longest = RECONNECT_SECONDS
            await asyncio.sleep(min(max(shortest, RECONNECT_SHARE * (time.monotonic() - self._down_since)), longest))

    def submit(self, journal: Journal, submit: pb.Submit, uncached_tokens: int = 0) -> int:
        """Places a request here, of whose prompt `uncached_tokens` are to be computed; returns the number of the
        attempt. Raises QwireError where the link is down or the worker doesn't read it."""
        if not self.ready or self.info is None:
            raise worker_lost()
        if self._outbox.qsize() >= OUTBOX_FRAMES:
            raise QwireError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "the worker doesn't take requests as fast as they come",
                reason=Reason.OVERLOADED,
                retry_after=WORKER_REFUSED_RETRY_SECONDS,
            )
        attempt = next(self._attempts)
        submit.attempt = attempt
        self._journals[attempt] = journal
        self._uncomputed[attempt] = uncached_tokens
        journal.submitted(self.info.worker_id)
        journal.drop_choice = lambda choice: self._drop_choice(attempt, choice)
        together = pb.FEATURE_SUBMITS in self.info.features
        if not together or self._last is None or not self._last.take(submit):
            self._last = _Submits(submit)
            self._outbox.put_nowait(self._last)
        return attempt

    def release(self, attempt: int, *, finished: bool) -> None:
        """Forgets an attempt, and stops it at the worker unless it is finished there."""
        if self._forget(attempt) is not None and not finished:
            self._abort(pb.Abort(attempts=[attempt]))

    def _forget(self, attempt: int) -> Journal | None:
        """Drops an attempt and what it counts. Everything that ends one comes through here, or through `_lose`."""
        self._uncomputed.pop(attempt, None)
        self.on_room()
        return self._journals.pop(attempt, None)

    def _drop_choice(self, attempt: int, choice: int) -> None:
        if attempt in self._journals:
            dropped = pb.AbortedChoice(attempt=attempt, choice=choice)
            self._abort(pb.Abort(choices=[dropped]))

    def _abort(self, abort: pb.Abort) -> None:
        self._last = None  # what is submitted from now on comes behind it
        self._outbox.put_nowait(abort)

    async def _serve(self, stub: worker_pb2_grpc.WorkerServiceAsyncStub) -> None:
        outbox = self._outbox = asyncio.Queue()
        self._last = None
        call = stub.Serve(self._frames(outbox))
        self._silent_looks = 0
        try:
            async with asyncio.timeout(None) as scope:
                watch = asyncio.create_task(self._watch(scope))
                try:
                    async for frame in call:
                        self._silent_looks = 0
                        if frame.HasField("welcome"):
                            if why := await self.object(frame.welcome.info):
                                raise _KeptOut(why)
                            self.kept_out = ""
                        self._take(frame)
                finally:
                    watch.cancel()
        finally:
            call.cancel()
            outbox.put_nowait(None)

    async def _watch(self, scope: asyncio.Timeout) -> None:
        """Ends the scope once the worker is silent."""
        while True:
            await asyncio.sleep(SILENCE_LOOK_SECONDS)
            self._silent_looks += 1
            if self._silent_looks >= (SILENT_LOOKS if self.ready else UNWELCOMED_LOOKS):
                scope.reschedule(asyncio.get_running_loop().time())
                return

    async def _frames(self, outbox: asyncio.Queue[_Submits | pb.Abort | None]) -> AsyncIterator[pb.ServeRequest]:
        yield pb.ServeRequest(hello=pb.Hello(router_id=self._router_id))
        while (item := await outbox.get()) is not None:  # None ends grpc's task that would wait here for ever
            yield pb.ServeRequest(abort=item) if isinstance(item, pb.Abort) else item.write()

    def _take(self, frame: pb.ServeResponse) -> None:
        match frame.WhichOneof("frame"):
            case "step":
                self._take_step(frame.step)
            case "prompt_logprobs":
                if journal := self._journals.get(frame.prompt_logprobs.attempt):
                    journal.take_prompt_logprobs(frame.prompt_logprobs)
            case "heartbeat":
                self._take_load(frame.heartbeat.load)
                if frame.heartbeat.draining:
                    self._set_ready(False)  # what runs there goes on
            case "welcome":
                self.info = frame.welcome.info
                log.info("linked to worker %s at %s: %s", self.info.worker_id, self.target, self.info.model.name)
                self._set_ready(True)
            case "admitted":
                for attempt in (frame.admitted.attempt, *frame.admitted.more):
                    if (journal := self._journals.get(attempt)) and not journal.admitted.done():
                        journal.admitted.set_result(None)
            case "refused":
                if frame.refused.reason == pb.REFUSED_REASON_DRAINING:
                    self._set_ready(False)
                if frame.refused.reason == pb.REFUSED_REASON_QUEUE_FULL:
                    self._saturated = True
                if journal := self._forget(frame.refused.attempt):
                    journal.lose(Lost(Why.REFUSED, _refusal(frame.refused)))
            case "failed":
                if journal := self._forget(frame.failed.attempt):
                    journal.fail(_failure(frame.failed))
            case "fault":
                log.error("worker at %s failed in a step of %d requests", self.target, len(frame.fault.attempts))
                self._lose(frozenset(frame.fault.attempts))
            case unknown:
                log.error("worker at %s sent a frame of no known kind: %s", self.target, unknown)

    def _take_load(self, load: pb.Load) -> None:
        self.load = load
        if self._saturated and self.info is not None and load.waiting < self.info.max_waiting:
            self._saturated = False
            self.on_room()

    def _take_step(self, step: pb.Step) -> None:
        self._take_load(step.load)
        requests: list[tokenizer_pb2.DetokenizeRequest] = []
        for sequence in step.sequences:
            if (journal := self._journals.get(sequence.attempt)) is not None:
                self._uncomputed.pop(sequence.attempt, None)  # its prompt is computed
                requests += journal.receive(sequence)
        if requests:
            self._detokenize(requests)

    def _keep_out(self, why: str) -> None:
        if why != self.kept_out:
            log.error("the worker at %s is kept out: %s", self.target, why)
        self.kept_out = why

    def _lose(self, suspects: frozenset[int] = frozenset()) -> None:
        """Gives up what was placed here.

        Args:
            suspects: attempts of which one may be what made the worker fail.
        """
        self._set_ready(False)
        journals, self._journals = self._journals, {}
        self._uncomputed.clear()
        for attempt, journal in journals.items():
            journal.lose(Lost(Why.FAULT if attempt in suspects else Why.LOST, worker_lost()))

    def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready = ready
            if not ready:
                self._down_since = time.monotonic()
            self._saturated = False
            self.changed.set()
            self.changed = asyncio.Event()
            self.on_room()


async def _no_objection(info: pb.WorkerInfo) -> str:
    return ""


def worker_lost() -> QwireError:
    return QwireError(
        grpc.StatusCode.UNAVAILABLE,
        "the worker that ran the request is gone",
        reason=Reason.WORKER_LOST,
        retry_after=LOST_RETRY_SECONDS,
    )


def _refusal(refused: pb.Refused) -> QwireError:
    match refused.reason:
        case pb.REFUSED_REASON_QUEUE_FULL:
            delay = refused.retry_after.seconds + refused.retry_after.nanos / 1e9
            return QwireError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "the worker's queue is full",
                reason=Reason.OVERLOADED,
                retry_after=delay or WORKER_REFUSED_RETRY_SECONDS,
            )
        case pb.REFUSED_REASON_DRAINING:
            return QwireError(
                grpc.StatusCode.UNAVAILABLE,
                "the worker is shutting down",
                reason=Reason.DRAINING,
                retry_after=WORKER_REFUSED_RETRY_SECONDS,
            )
        case pb.REFUSED_REASON_TOO_LARGE:
            return QwireError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "prompt and max_tokens together need more KV cache than the worker has",
                reason=Reason.INVALID_REQUEST,
            )
        case pb.REFUSED_REASON_CONSTRAINT:
            return QwireError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{refused.field} {refused.detail}",
                reason=Reason.INVALID_CONSTRAINT,
                violations=[FieldViolation(refused.field, refused.detail)],
            )
        case _:
            return QwireError(grpc.StatusCode.INTERNAL, "the worker refused the request", reason=Reason.INTERNAL)


def _failure(failed: pb.Failed) -> QwireError:
    if failed.reason == pb.FAILED_REASON_CONSTRAINT_TOO_COMPLEX:
        detail = "takes more work to follow than a token may: too much is open at once in what was generated"
        return QwireError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"constraint {detail}",
            reason=Reason.CONSTRAINT_TOO_COMPLEX,
            violations=[FieldViolation("constraint", detail)],
        )
    return QwireError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed", reason=Reason.DEADLINE)
