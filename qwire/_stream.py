"""What a Generate stream delivered, and the proof that nothing is missing, doubled or out of order.

Invariant: a delta is taken in only if it begins exactly where its choice's output ends. So what a `Transcript` holds is
always a prefix of what the server generated, and all of it once the stream has ended well. This holds across resumes:
what a cut stream delivered and what the next one brings are one output.
"""

from __future__ import annotations

import grpc

from qwire._tries import Tries
from qwire.errors import QwireError, Reason
from qwire.v1 import generation_pb2 as gen


class ChoiceOutput:
    """The output of one choice so far.

    Attributes:
        token_ids: all ids delivered; empty where the request turned ids off.
        logprobs: one for each id, if asked for.
        finished: how the choice ended; None while it hasn't.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[gen.TokenLogprobs] = []
        self.finished: gen.Finished | None = None
        self._parts: list[str] = []
        self._text_bytes = 0

    @property
    def text(self) -> str:
        """All text delivered; empty where the request turned text off."""
        # Joined only when read: joining at every delta would make a long output quadratic.
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @property
    def text_bytes(self) -> int:
        """Length of `text` in UTF-8 bytes."""
        return self._text_bytes

    def _append(self, delta: gen.Delta) -> None:
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        if delta.text:
            self._parts.append(delta.text)
            self._text_bytes += len(delta.text.encode())


class Transcript:
    """Takes in the messages of one stream in order, and of those that go on with it."""

    def __init__(self, request: gen.GenerateRequest) -> None:
        self._request = request
        self._resumed = False
        """The next message is the Accepted of a stream that goes on with this one."""
        output = request.output
        self._wants_ids = output.token_ids or not output.HasField("token_ids")
        self._wants_text = output.text or not output.HasField("text")
        self.accepted: gen.Accepted | None = None
        self.choices: dict[int, ChoiceOutput] = {}

    def choice(self, index: int) -> ChoiceOutput:
        """The output of a choice, empty if nothing of it has come."""
        return self.choices.get(index) or ChoiceOutput()

    @property
    def resumable(self) -> bool:
        """Whether another stream can go on with this one, should it be cut."""
        # Without ids the output is generated again, and its log-probabilities would come twice.
        countable = self._wants_ids or not self._request.output.HasField("logprobs")
        return self.accepted is not None and bool(self.accepted.resume_token) and countable

    @property
    def complete(self) -> bool:
        """Whether every choice has finished."""
        return self.accepted is not None and all(
            self.choice(index).finished is not None for index in range(self._count(self.accepted))
        )

    def resume(self) -> gen.GenerateRequest:
        """The request that goes on where this stream was cut; the first one again where nothing has come."""
        if self.accepted is None:
            return self._request
        self._resumed = True
        request = gen.GenerateRequest()
        request.CopyFrom(self._request)
        request.request_id = self.accepted.request_id  # so that it ends the first one, should that live on unnoticed
        request.resume.token = self.accepted.resume_token
        for index in range(self._count(self.accepted)):
            choice = self.choice(index)
            request.resume.choices.add(
                token_ids=choice.token_ids, text_bytes=choice.text_bytes, finished=choice.finished is not None
            )
        return request

    def add(self, response: gen.GenerateResponse) -> bool:
        """Takes in a message; returns whether it says anything new, which a resumed stream's Accepted doesn't.

        Raises:
            QwireError: INTERNAL, if the message doesn't continue what came before.
        """
        event = response.WhichOneof("event")
        if event == "accepted":
            if self._resumed:
                self._resumed = False
                return False
            if self.accepted is not None:
                raise _broken("a second Accepted")
            self.accepted = response.accepted
        elif event is not None and (self.accepted is None or self._resumed):
            raise _broken(f"{event} before Accepted")
        elif event == "delta":
            self._add_delta(response.delta)
        elif event == "finished":
            self._add_finished(response.finished)
        return True  # An event that this client is too old to know is no fault.

    def end(self) -> None:
        """Says that the stream ended with OK.

        Raises:
            QwireError: INTERNAL, if something should have come before that.
        """
        if self.accepted is None or self._resumed:
            raise _broken("the end before Accepted")
        for index in range(self._count(self.accepted)):
            if self.choice(index).finished is None:
                raise _broken(f"the end before choice {index} finished")

    @staticmethod
    def _count(accepted: gen.Accepted) -> int:
        return max(1, accepted.sampling.n)

    def _open(self, index: int, event: str) -> ChoiceOutput:
        choice = self.choices.setdefault(index, ChoiceOutput())
        if choice.finished is not None:
            raise _broken(f"{event} for choice {index}, which has finished")
        return choice

    def _add_delta(self, delta: gen.Delta) -> None:
        choice = self._open(delta.choice, "a delta")
        if self._wants_ids and delta.token_index != len(choice.token_ids):
            raise _broken(f"token {delta.token_index} of choice {delta.choice} where {len(choice.token_ids)} is next")
        if self._wants_text and delta.text_offset != choice.text_bytes:
            raise _broken(f"text byte {delta.text_offset} of choice {delta.choice} where {choice.text_bytes} is next")
        choice._append(delta)

    def _add_finished(self, finished: gen.Finished) -> None:
        choice = self._open(finished.choice, "a Finished")
        # The indexes can't show that the last delta is missing; the count can.
        generated = finished.usage.generated_tokens
        if self._wants_ids and finished.HasField("usage") and generated != len(choice.token_ids):
            raise _broken(f"{generated} tokens of choice {finished.choice} counted, {len(choice.token_ids)} delivered")
        choice.finished = finished


def cancelled() -> QwireError:
    """What whoever iterates gets when the caller has cancelled."""
    return QwireError(grpc.StatusCode.CANCELLED, "cancelled by the caller")


def _broken(what: str) -> QwireError:
    return QwireError(grpc.StatusCode.INTERNAL, f"the server broke the stream's rules: {what}", reason=Reason.INTERNAL)


class GenerationView:
    """What both generations show of their stream."""

    def __init__(self, request: gen.GenerateRequest, tries: Tries) -> None:
        self._transcript = Transcript(request)
        self._tries = tries

    def _delay(self, error: QwireError) -> float | None:
        """Seconds after which a stream that failed is gone on with; None where it isn't."""
        self._tries.begun = self._transcript.resumable
        if self._transcript.accepted is not None and not self._transcript.resumable:
            return None
        return self._tries.after(error)

    @property
    def accepted(self) -> gen.Accepted | None:
        """The request as the server resolved it; None until a worker has taken it."""
        return self._transcript.accepted

    @property
    def text(self) -> str:
        """Text of choice 0 so far."""
        return self._transcript.choice(0).text

    @property
    def token_ids(self) -> list[int]:
        """Ids of choice 0 so far, as a copy."""
        return list(self._transcript.choice(0).token_ids)

    @property
    def finished(self) -> gen.Finished | None:
        """How choice 0 ended, with usage and timing; None while it hasn't."""
        return self._transcript.choice(0).finished

    @property
    def choices(self) -> dict[int, ChoiceOutput]:
        """All choices of which something has come, by index."""
        return dict(sorted(self._transcript.choices.items()))
