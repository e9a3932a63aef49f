"""The journal of one client stream: what a choice has got so far, and what is still to be written to the client.

Ids arrive from the worker in order and are kept, all of them: with the prompt, the resolved parameters and the seed
they are what the stream could be continued from. Text arrives from the tokenizer service for a growing prefix of the
ids. What the client hasn't been sent yet is one pending Delta, into which later output is merged: its size depends on
how fast the client reads, the bytes that it carries do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from google.protobuf.duration_pb2 import Duration

from qwire.errors import QwireError, Reason
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import tokenizer_pb2, worker_pb2

FINISH_REASONS = {
    worker_pb2.END_REASON_EOS: pb.FINISH_REASON_EOS,
    worker_pb2.END_REASON_STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    worker_pb2.END_REASON_LENGTH: pb.FINISH_REASON_LENGTH,
}


class IndexGap(Exception):
    """A worker's ids don't continue those it sent before."""


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A request as resolved: all that the journal needs to know of it."""

    sequence: int
    """Names the stream to the detokenizer."""
    prompt_tokens: int
    stop: pb.StopOptions
    want_text: bool
    want_ids: bool
    max_pending_tokens: int

    @property
    def detokenized(self) -> bool:
        """Whether ids pass through the tokenizer service at all."""
        return self.want_text or bool(self.stop.strings)


@dataclass(slots=True)
class _Times:
    """Seconds on the journal's clock."""

    arrival: float
    submitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    start: worker_pb2.SequenceStart = field(default_factory=worker_pb2.SequenceStart)


class Journal:
    """State of one stream. Lives on the event loop; nothing here waits except `next_messages` and `admitted`."""

    def __init__(self, spec: StreamSpec, arrival: float, clock: Callable[[], float]) -> None:
        self.spec = spec
        self.worker = ""
        """Id of the worker that runs it."""
        self.ids: list[int] = []
        """Every id received until the stream was settled, those after a stop string in the same step too."""
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock = clock
        self._times = _Times(arrival)
        self._delivered = 0
        """How many of `ids` are in Deltas, the pending one included."""
        self._text_bytes = 0
        self._pending: pb.Delta | None = None
        self._end: worker_pb2.EndReason.ValueType = worker_pb2.END_REASON_UNSPECIFIED
        self._match: str | None = None
        self._complete = False
        self._error: QwireError | None = None
        self._changed = asyncio.Event()

    # From the worker link.

    def submitted(self, worker: str) -> None:
        self.worker = worker
        self._times.submitted = self._clock()

    def receive(self, step: worker_pb2.SequenceStep) -> list[tokenizer_pb2.DetokenizeRequest]:
        """Takes in new ids; returns what the detokenizer is to be told. Raises IndexGap."""
        # First, because nothing is kept any more: the worker goes on until the client has taken what it is owed and the
        # attempt is released, which may be many steps later.
        if self._settled:
            return []
        if step.token_index != len(self.ids):
            raise IndexGap(f"ids from index {step.token_index} on, {len(self.ids)} were there")
        now = self._clock()
        if step.HasField("start"):
            self._times.start.CopyFrom(step.start)
        if not self.ids:
            self._times.first_token = now
        self._times.last_token = now
        first = len(self.ids)
        self.ids += step.token_ids
        if step.HasField("end"):
            self._end = step.end.reason
        if self.spec.detokenized:
            return self._pushes(first)
        self._emit(len(self.ids), "")
        if self.ended_at_worker:
            self._finish()
        return []

    def fail(self, error: QwireError) -> None:
        """Ends the stream with a status, unless it has ended already."""
        if not self._settled:
            self._error = error
            self._changed.set()
        if not self.admitted.done():
            self.admitted.set_exception(error)
            self.admitted.exception()  # or asyncio complains where the stream ends before anyone waits for it

    # From the tokenizer link.

    def open_requests(self) -> list[tokenizer_pb2.DetokenizeRequest]:
        """Opens the stream at the detokenizer where its text stands now, and hands on what came since."""
        stop = self.spec.stop
        opening = tokenizer_pb2.DetokenizeOpen(
            sequence=self.spec.sequence,
            start_ids=self.ids[: self._delivered],
            stop_strings=stop.strings,
            include_stop=stop.include_stop,
            min_tokens=stop.min_tokens,
        )
        return [tokenizer_pb2.DetokenizeRequest(open=opening), *self._pushes(self._delivered)]

    def take_piece(self, piece: tokenizer_pb2.DetokenizePiece) -> None:
        """Takes in text for a longer prefix of the ids."""
        if self._settled:
            return
        if piece.HasField("error"):
            self.fail(
                QwireError(grpc.StatusCode.INTERNAL, "the output could not be turned into text", reason=Reason.INTERNAL)
            )
            return
        self._emit(piece.ids_consumed, piece.text)
        if piece.HasField("match"):
            self._match = piece.match
            self._finish()
        elif piece.final:
            self._finish()

    # To the client.

    async def next_messages(self) -> list[pb.GenerateResponse]:
        """Waits for something to write and takes it; empty once the stream is complete. Raises QwireError."""
        while self._pending is None and not self._settled:
            self._changed.clear()
            await self._changed.wait()
        messages = []
        if self._pending is not None:
            messages.append(pb.GenerateResponse(delta=self._pending))
            self._pending = None
        if self._complete:
            messages.append(pb.GenerateResponse(finished=self._finished()))
        elif self._error is not None and not messages:
            raise self._error
        return messages

    @property
    def ended_at_worker(self) -> bool:
        """Whether the worker is done with it by itself."""
        return self._end != worker_pb2.END_REASON_UNSPECIFIED

    @property
    def _settled(self) -> bool:
        return self._complete or self._error is not None

    def _pushes(self, first: int) -> list[tokenizer_pb2.DetokenizeRequest]:
        requests = []
        sequence = self.spec.sequence
        if first < len(self.ids):
            push = tokenizer_pb2.DetokenizePush(sequence=sequence, first_index=first, ids=self.ids[first:])
            requests.append(tokenizer_pb2.DetokenizeRequest(push=push))
        if self.ended_at_worker:
            close = tokenizer_pb2.DetokenizeClose(sequence=sequence)
            requests.append(tokenizer_pb2.DetokenizeRequest(close=close))
        return requests

    def _emit(self, consumed: int, text: str) -> None:
        """Adds ids up to `consumed` and new text to the pending Delta."""
        ids = self.ids[self._delivered : consumed]
        text = text if self.spec.want_text else ""
        if not (ids or text):
            return
        unread = self._pending is not None
        if self._pending is None:
            self._pending = pb.Delta(choice=0, token_index=self._delivered, text_offset=self._text_bytes)
        if self.spec.want_ids:
            self._pending.token_ids.extend(ids)
        self._pending.text += text
        self._delivered = max(self._delivered, consumed)
        self._text_bytes += len(text.encode())
        # Many ids at once, from a tokenizer service that was away for a while, are not the reader's fault.
        if ids and unread and self._delivered - self._pending.token_index > self.spec.max_pending_tokens:
            self.fail(
                QwireError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"the stream was not read: over {self.spec.max_pending_tokens} tokens wait",
                    reason=Reason.SLOW_READER,
                )
            )
        self._changed.set()

    def _finish(self) -> None:
        self._complete = True
        self._changed.set()

    def _finished(self) -> pb.Finished:
        times = self._times
        finished = pb.Finished(
            choice=0,
            reason=pb.FINISH_REASON_STOP_STRING if self._match is not None else FINISH_REASONS[self._end],
            usage=pb.Usage(
                prompt_tokens=self.spec.prompt_tokens,
                cached_tokens=times.start.cached_tokens,
                generated_tokens=self._delivered,
            ),
            timing=pb.Timing(
                queue=_seconds(times.submitted - times.arrival + _in_seconds(times.start.queue)),
                prefill=times.start.prefill,
                first_token=_seconds(times.first_token - times.arrival),
                decode=_seconds(times.last_token - times.first_token),
            ),
            placement=pb.Placement(worker=self.worker, exact=True),
        )
        if self._match is not None:
            finished.stop_string = self._match
        elif self._end in (worker_pb2.END_REASON_EOS, worker_pb2.END_REASON_STOP_TOKEN):
            finished.stop_token_id = self.ids[-1]
        return finished


def _seconds(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(0, round(seconds * 1e9)))
    return duration


def _in_seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
