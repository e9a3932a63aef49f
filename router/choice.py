"""One choice of a stream: the ids and the text that it has got so far, and what of them is still to be written.

Ids arrive from the worker in order and are kept, all of them, in four bytes each: with the prompt, the resolved
parameters and the seed they are what the choice could be continued from. Text arrives from the tokenizer service for a
growing prefix of the ids. What the client hasn't been sent yet becomes one Delta when the client takes it: how many
there are depends on how fast the client reads, the bytes that they carry do not.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from qwire.errors import QwireError, Reason
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import tokenizer_pb2, worker_pb2

FINISH_REASONS = {
    worker_pb2.END_REASON_EOS: pb.FINISH_REASON_EOS,
    worker_pb2.END_REASON_STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    worker_pb2.END_REASON_LENGTH: pb.FINISH_REASON_LENGTH,
    worker_pb2.END_REASON_CONSTRAINT: pb.FINISH_REASON_CONSTRAINT,
    worker_pb2.END_REASON_DEAD_END: pb.FINISH_REASON_DEAD_END,
}


class IndexGap(Exception):
    """A worker's ids don't continue those it sent before."""


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """What a stream is to carry, and when its choices end."""

    stop: pb.StopOptions
    want_text: bool
    want_ids: bool
    max_pending_tokens: int

    @property
    def detokenized(self) -> bool:
        """Whether ids pass through the tokenizer service at all."""
        return self.want_text or bool(self.stop.strings)


class Choice:
    """State of one choice. `fail` ends its whole stream."""

    def __init__(self, index: int, sequence: int, spec: OutputSpec, fail: Callable[[QwireError], None]) -> None:
        self.index = index
        self.sequence = sequence
        """Names the choice to the detokenizer."""
        self.spec = spec
        self.fail = fail
        self._detokenized = spec.detokenized
        self.ids = array("I")
        """Every id received until the choice was complete, those after a stop string in the same step too, behind those
        that a resuming client held."""
        self.complete = False
        """All of its output is in Deltas, the pending one included."""
        self.first_token = 0.0
        self.last_token = 0.0
        """When ids came, in seconds on the stream's clock."""
        self._logprobs: list[pb.TokenLogprobs] = []
        """Of the ids that came in this call."""
        self._held_ids = 0
        self._held_bytes = 0
        """How many ids and bytes of text a resuming client held already: they are not in Deltas again."""
        self._delivered = 0
        """How many of `ids` the client has or may have now."""
        self._written = 0
        """How many of those are in Deltas that were taken."""
        self._consumed = 0
        """How many of `ids` have become text."""
        self._text_bytes = 0
        """Length of that text."""
        self._texts: list[str] = []
        """What of it is in no Delta yet."""
        self._text_offset = 0
        """Where in the text that begins."""
        self._end: worker_pb2.EndReason.ValueType = worker_pb2.END_REASON_UNSPECIFIED
        self._match: str | None = None

    @property
    def ended_at_worker(self) -> bool:
        """Whether the worker is done with it by itself."""
        return self._end != worker_pb2.END_REASON_UNSPECIFIED

    @property
    def needs_worker(self) -> bool:
        """Whether more ids are wanted."""
        return not (self.complete or self.ended_at_worker)

    @property
    def generated(self) -> int:
        """Ids that came in this call."""
        return len(self.ids) - self._held_ids

    def resume(self, held: pb.ResumeChoice, end: worker_pb2.EndReason.ValueType) -> None:
        """Goes on where a client stands, before anything else was done with the choice.

        Text is a function of ids: it comes anew from the first id on, and what the client holds of it is left out.

        Args:
            end: how the ids end, unspecified where more are wanted.
        """
        self.ids = array("I", held.token_ids)
        self._held_ids = self._delivered = self._written = len(self.ids)
        self._held_bytes = self._text_offset = held.text_bytes if self.spec.want_text else 0
        self._end = end
        self.complete = held.finished or (self.ended_at_worker and not self._detokenized)

    def receive(self, step: worker_pb2.SequenceStep, now: float) -> list[tokenizer_pb2.DetokenizeRequest]:
        """Takes in new ids; returns what the detokenizer is to be told. Raises IndexGap."""
        first = len(self.ids)
        if step.token_index != first:
            raise IndexGap(f"ids from index {step.token_index} on, {first} were there")
        if first == self._held_ids:
            self.first_token = now
        self.last_token = now
        self.ids.extend(step.token_ids)
        if step.logprobs:
            self._logprobs += step.logprobs
        if step.HasField("end"):
            self._end = step.end.reason
        if self._detokenized:
            return self._pushes(first)
        self._emit(len(self.ids), "")
        self.complete = self.ended_at_worker
        return []

    def open_requests(self) -> list[tokenizer_pb2.DetokenizeRequest]:
        """Opens the choice at the detokenizer where its text stands now, and hands on what came since."""
        stop = self.spec.stop
        opening = tokenizer_pb2.DetokenizeOpen(
            sequence=self.sequence,
            start_ids=self.ids[: self._consumed],
            stop_strings=stop.strings,
            include_stop=stop.include_stop,
            min_tokens=stop.min_tokens,
        )
        return [tokenizer_pb2.DetokenizeRequest(open=opening), *self._pushes(self._consumed)]

    def take_piece(self, piece: tokenizer_pb2.DetokenizePiece) -> None:
        """Takes in text for a longer prefix of the ids."""
        if piece.HasField("error"):
            self.fail(
                QwireError(grpc.StatusCode.INTERNAL, "the output could not be turned into text", reason=Reason.INTERNAL)
            )
            return
        self._emit(piece.ids_consumed, piece.text)
        if piece.HasField("match"):
            self._match = piece.match
            self.complete = True
        elif piece.final:
            self.complete = True

    def take_delta(self) -> pb.Delta | None:
        """What is still to be written, once."""
        first, self._written = self._written, self._delivered
        if first == self._written and not self._texts:
            return None
        delta = pb.Delta(choice=self.index, token_index=first, text_offset=self._text_offset)
        if self.spec.want_ids:
            delta.token_ids.extend(self.ids[first : self._written])
        if self._logprobs:
            delta.logprobs.extend(self._logprobs[first - self._held_ids : self._written - self._held_ids])
        if self._texts:
            delta.text = "".join(self._texts)
            self._texts.clear()
            self._text_offset = max(self._text_bytes, self._held_bytes)
        return delta

    def finished(self) -> pb.Finished:
        """How it ended; prompt usage, timing and placement are the stream's to fill in."""
        reason = pb.FINISH_REASON_STOP_STRING if self._match is not None else FINISH_REASONS[self._end]
        finished = pb.Finished(choice=self.index, reason=reason, usage=pb.Usage(generated_tokens=self._delivered))
        if self._match is not None:
            finished.stop_string = self._match
        elif self._end in (worker_pb2.END_REASON_EOS, worker_pb2.END_REASON_STOP_TOKEN):
            finished.stop_token_id = self.ids[-1]
        return finished

    def _pushes(self, first: int) -> list[tokenizer_pb2.DetokenizeRequest]:
        requests = []
        if first < len(self.ids):
            push = tokenizer_pb2.DetokenizePush(sequence=self.sequence, first_index=first, ids=self.ids[first:])
            requests.append(tokenizer_pb2.DetokenizeRequest(push=push))
        if self.ended_at_worker:
            close = tokenizer_pb2.DetokenizeClose(sequence=self.sequence)
            requests.append(tokenizer_pb2.DetokenizeRequest(close=close))
        return requests

    def _emit(self, consumed: int, text: str) -> None:
        """Adds ids up to `consumed` and new text to what is to be written."""
        self._consumed = max(self._consumed, consumed)
        unread = self._delivered > self._written or bool(self._texts)
        more = consumed > self._delivered
        self._delivered = max(self._delivered, consumed)
        if text and self.spec.want_text and (text := self._not_held(text)):
            self._texts.append(text)
        # Many ids at once, from a tokenizer service that was away for a while, are not the reader's fault.
        if more and unread and self._delivered - self._written > self.spec.max_pending_tokens:
            self.fail(
                QwireError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"the stream was not read: over {self.spec.max_pending_tokens} tokens wait",
                    reason=Reason.SLOW_READER,
                )
            )

    def _not_held(self, text: str) -> str:
        """Counts new text, and leaves out what a resuming client holds of it."""
        data = text.encode()
        held = min(max(self._held_bytes - self._text_bytes, 0), len(data))
        self._text_bytes += len(data)
        # A client that counts wrongly may hold half a character; what it gets then is no worse.
        return data[held:].decode(errors="replace") if held else text
