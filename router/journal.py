"""The journal of one client stream: its choices, its times, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from google.protobuf.duration_pb2 import Duration

from qwire.errors import QwireError
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import tokenizer_pb2, worker_pb2
from router.choice import Choice, IndexGap, OutputSpec
from router.flow import Flow, Turns


class Why(Enum):
    """Why an attempt at a request came to nothing."""

    REFUSED = "the worker didn't take it"
    LOST = "the worker is gone"
    FAULT = "a step in which it was has failed"


@dataclass(frozen=True, slots=True)
class Lost:
    """The end of an attempt that another may follow; `error` is what the client hears if none does."""

    why: Why
    error: QwireError


class Journal:
    """State of one stream. Lives on the event loop; nothing here waits except `next_messages`, `admitted` and `lost`.

    It knows attempts only as what an attempt brings: who makes them, and makes another, is `router.dispatch`.

    Args:
        sequences: one a choice, what names it to the detokenizer.
        arrival: when the request arrived, on `clock`, in seconds.
        turns: of the client, by what is called when it may be written to; at once if there are none.
    """

    def __init__(
        self,
        spec: OutputSpec,
        sequences: range,
        prompt_tokens: int,
        arrival: float,
        clock: Callable[[], float],
        turns: Callable[[Callable[[], None]], Turns] | None = None,
    ) -> None:
        self.worker = ""
        """Id of the worker that runs it."""
        self.choices = [Choice(index, sequence, spec, self.fail) for index, sequence in enumerate(sequences)]
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.drop_choice: Callable[[int], None] = lambda index: None
        """Called for a choice that is complete before its worker knows, while others go on."""
        self.prompt_logprobs: list[pb.TokenLogprobs] = []
        """Those of the prompt, if they were asked for, as far as they came."""
        self._prompt_tokens = prompt_tokens
        self._arrival = arrival
        self._clock = clock
        self._submitted = 0.0
        self.lost: asyncio.Future[Lost]
        """Of the attempt that was submitted last."""
        self.yielded = False
        """Whether that attempt has brought ids."""
        self.moves = 0
        self.exact = True
        self._recomputed = 0
        self._start: worker_pb2.SequenceStart | None = None
        """Of the first attempt that got so far."""
        self._replayed = 0
        """Ids that were generated before the attempt."""
        self._unfinished = set(range(len(sequences)))
        """Choices whose Finished isn't taken yet."""
        self._error: QwireError | None = None
        self._turn = asyncio.Event()
        """The client may be written to: at first, for there may be something of a resumed stream, and then whenever
        there is something and its turn has come."""
        self._turn.set()
        self._turns = (turns or Flow().valve)(self._turn.set)

    # From the worker link.

    def submitted(self, worker: str) -> None:
        """An attempt begins: whatever came before is over."""
        self.worker = worker
        self.yielded = False
        self.lost = asyncio.get_running_loop().create_future()
        if not self.prompt_scored:
            self.prompt_logprobs.clear()
        self._replayed = sum(len(choice.ids) for choice in self.choices if choice.needs_worker)
        if self.moves == 0:
            self._submitted = self._clock()

    def lose(self, lost: Lost) -> None:
        """The attempt is over, and the stream isn't."""
        if not self.lost.done():
            self.lost.set_result(lost)

    def receive(self, step: worker_pb2.SequenceStep) -> list[tokenizer_pb2.DetokenizeRequest]:
        """Takes in new ids; returns what the detokenizer is to be told. Raises IndexGap."""
        if step.choice >= len(self.choices):
            raise IndexGap(f"ids of choice {step.choice}, there are {len(self.choices)}")
        choice = self.choices[step.choice]
        # First, because nothing is kept any more: the worker goes on until the client has taken what it is owed and the
        # attempt is released, which may be many steps later.
        if choice.complete or self._error is not None:
            return []
        if step.HasField("start"):
            self._take_start(step.start)
        requests = choice.receive(step, self._clock())
        self.yielded = True
        self._tell(choice)
        return requests

    def take_prompt_logprobs(self, part: worker_pb2.PromptLogprobs) -> None:
        """Takes in log-probabilities of the prompt. Raises IndexGap."""
        if part.first != len(self.prompt_logprobs):
            raise IndexGap(f"prompt from index {part.first} on, {len(self.prompt_logprobs)} were there")
        self.prompt_logprobs += part.logprobs

    @property
    def prompt_scored(self) -> bool:
        """Whether all log-probabilities of the prompt are there that there can be."""
        return len(self.prompt_logprobs) == self._prompt_tokens - 1

    def fail(self, error: QwireError) -> None:
        """Ends the stream with a status, unless it has ended already."""
        if self._error is None and not all(choice.complete for choice in self.choices):
            self._error = error
            self._turns.force()
        if not self.admitted.done():
            self.admitted.set_exception(error)
            self.admitted.exception()  # or asyncio complains where the stream ends before anyone waits for it

    def close(self) -> None:
        """The stream is over. The journal and its choices let go of each other: else only the garbage collector, which
        stops the event loop, could free them."""
        for choice in self.choices:
            choice.fail = _unheard

    # From the tokenizer link.

    @property
    def sequences(self) -> list[int]:
        """What names its choices to the detokenizer."""
        return [choice.sequence for choice in self.choices]

    def open_requests(self) -> list[tokenizer_pb2.DetokenizeRequest]:
        """Opens every choice at the detokenizer where its text stands now, and hands on what came since."""
        return [request for choice in self.choices if not choice.complete for request in choice.open_requests()]

    def take_piece(self, piece: tokenizer_pb2.DetokenizePiece) -> None:
        """Takes in text for a longer prefix of a choice's ids."""
        choice = self.choices[piece.sequence - self.choices[0].sequence]
        if choice.complete or self._error is not None:
            return
        choice.take_piece(piece)
        self._tell(choice)
        self._drop_if_others_go_on(choice)

    # To the client.

    async def next_messages(self) -> list[pb.GenerateResponse]:
        """Waits for something to write and takes it. Raises QwireError once all before it is taken."""
        while True:
            await self._turn.wait()
            if messages := self._take_messages():
                if self._error is None:
                    self._turn.clear()
                return messages
            if self._error is not None:
                raise self._error
            self._turn.clear()

    @property
    def finished(self) -> bool:
        """Whether every message was taken."""
        return not self._unfinished

    @property
    def needs_worker(self) -> bool:
        """Whether more ids are wanted of any choice."""
        return self._error is None and any(choice.needs_worker for choice in self.choices)

    @property
    def generated_tokens(self) -> int:
        """Ids that workers generated for it in this call."""
        return sum(choice.generated for choice in self.choices)

    def resume(self, held: Sequence[pb.ResumeChoice], ends: Sequence[worker_pb2.EndReason.ValueType]) -> None:
        """Goes on where a client stands; see `Choice.resume`. Before anything else is done with the journal."""
        for choice, has, end in zip(self.choices, held, ends, strict=True):
            choice.resume(has, end)
            if has.finished:
                self._unfinished.discard(choice.index)

    def submit_choices(self) -> list[worker_pb2.SubmitChoice]:
        """Where each choice stands, for the next attempt to go on from."""
        return [
            worker_pb2.SubmitChoice(generated_ids=choice.ids)
            if choice.needs_worker
            else worker_pb2.SubmitChoice(ended=True)
            for choice in self.choices
        ]

    @property
    def ended_at_worker(self) -> bool:
        """Whether the worker is done with all of it by itself."""
        return all(choice.ended_at_worker for choice in self.choices)

    def _tell(self, choice: Choice) -> None:
        """There is something of a choice to write; its end is not waited with."""
        if choice.complete:
            self._turns.force()
        else:
            self._turns.knock()

    def _drop_if_others_go_on(self, choice: Choice) -> None:
        if choice.complete and not choice.ended_at_worker and not all(other.complete for other in self.choices):
            self.drop_choice(choice.index)

    def _take_messages(self) -> list[pb.GenerateResponse]:
        messages = []
        for choice in self.choices:
            if (delta := choice.take_delta()) is not None:
                messages.append(pb.GenerateResponse(delta=delta))
            if choice.complete and choice.index in self._unfinished:
                self._unfinished.discard(choice.index)
                messages.append(pb.GenerateResponse(finished=self._finished(choice)))
        return messages

    def _finished(self, choice: Choice) -> pb.Finished:
        finished = choice.finished()
        finished.usage.prompt_tokens = self._prompt_tokens
        start = self._start or worker_pb2.SequenceStart()
        finished.usage.cached_tokens = start.cached_tokens
        finished.timing.CopyFrom(
            pb.Timing(
                queue=_seconds(self._submitted - self._arrival + _in_seconds(start.queue)),
                prefill=start.prefill,
                first_token=_seconds(choice.first_token - self._arrival),
                decode=_seconds(choice.last_token - choice.first_token),
            )
        )
        finished.placement.CopyFrom(
            pb.Placement(worker=self.worker, moves=self.moves, recomputed_tokens=self._recomputed, exact=self.exact)
        )
        return finished

    def _take_start(self, start: worker_pb2.SequenceStart) -> None:
        self._recomputed += self._replayed
        if self._start is None:
            self._start = worker_pb2.SequenceStart()
            self._start.CopyFrom(start)  # what it is part of, a step's frame, must not live as long as the stream
        else:
            self._recomputed += self._prompt_tokens - start.cached_tokens


def _unheard(error: QwireError) -> None:
    """Of a stream that is over."""


def _seconds(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(0, round(seconds * 1e9)))
    return duration


def _in_seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
