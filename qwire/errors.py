"""Errors as callers see them: one exception type, the reasons that services give, and the codec for their details.

A failed call carries a `google.rpc.Status` in the trailing metadata key `grpc-status-details-bin` (the convention of
gRPC's richer error model). `QwireError` is what both clients raise for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

ERROR_DOMAIN = "qwire"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
DONT_RETRY = "-1"
"""Its value where gRPC is to leave it."""

# Peers refuse trailing metadata of more than 8 KiB (grpc.max_metadata_size) and then see none of it. The message is in
# there twice, once percent-encoded, and the details travel as base64.
MAX_MESSAGE_BYTES = 1024
MAX_VIOLATIONS_BYTES = 2048


class Reason(StrEnum):
    """Why a call failed: `ErrorInfo.reason` under the domain "qwire". Stable; new ones may be added."""

    INVALID_REQUEST = "INVALID_REQUEST"
    """One or more fields are wrong; `violations` name them all."""
    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    """The bytes are not a message of the method's request type."""
    UNKNOWN_FIELD = "UNKNOWN_FIELD"
    """The request holds fields that this server doesn't know."""
    NOT_IN_THIS_RELEASE = "NOT_IN_THIS_RELEASE"
    """The contract names it, this release doesn't have it."""
    INVALID_CONSTRAINT = "INVALID_CONSTRAINT"
    """The constraint is malformed, not supported, or takes too much to compile."""
    CONSTRAINT_TOO_COMPLEX = "CONSTRAINT_TOO_COMPLEX"
    """Following the constraint took more work than a token may."""
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    """No worker serves a model of that name."""
    NO_CHAT_TEMPLATE = "NO_CHAT_TEMPLATE"
    """The model has no chat template."""
    CHAT_TEMPLATE_FAILED = "CHAT_TEMPLATE_FAILED"
    """The model's chat template refused the messages, or ran out of time or memory."""
    DUPLICATE_REQUEST_ID = "DUPLICATE_REQUEST_ID"
    """A live request of the caller has this id."""
    SUPERSEDED = "SUPERSEDED"
    """The caller sent the request again under the same id: this stream ends, that one goes on."""
    NO_WORKER = "NO_WORKER"
    """No worker is ready."""
    WORKER_LOST = "WORKER_LOST"
    """The worker that ran the request is gone, and so were those that it had moved to before."""
    NO_EQUIVALENT_WORKER = "NO_EQUIVALENT_WORKER"
    """The worker that ran the request is gone, and none is ready that would give exactly the same tokens."""
    REQUEST_FAULTS_WORKER = "REQUEST_FAULTS_WORKER"
    """Two workers failed when they computed the request."""
    RESUME_MISMATCH = "RESUME_MISMATCH"
    """The stream to go on with was another one: prompt or parameters differ, or the token isn't this fleet's."""
    TOKENIZER_UNAVAILABLE = "TOKENIZER_UNAVAILABLE"
    """The tokenizer service can't be reached."""
    OVERLOADED = "OVERLOADED"
    """A limit on what runs or waits is reached; try again after `retry_after`."""
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
    """The deadline would pass before the request's turn, as far as can be told; nothing was done for it."""
    SLOW_READER = "SLOW_READER"
    """The caller didn't read the stream while tokens piled up."""
    DEADLINE = "DEADLINE"
    """The call's deadline passed."""
    DRAINING = "DRAINING"
    """The server is shutting down."""
    INTERNAL = "INTERNAL"
    """A fault of the server; its log has more under the same request id."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its path in the request (`sampling.top_p`), and limit and value in words."""

    field: str
    description: str


class QwireError(Exception):
    """A failed call.

    Attributes:
        code: the gRPC status code.
        message: what went wrong, for people.
        reason: one of `Reason`, or the server's own text where this client is older; empty if the error came from
            gRPC itself (no server, a cut connection).
        violations: for INVALID_ARGUMENT, every wrong field, or the first ones where all would not fit an answer.
        retry_after: seconds after which trying again makes sense; None where it doesn't.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
    ) -> None:
        message = _cut(message, MAX_MESSAGE_BYTES)
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.reason = reason
        self.violations = _first_that_fit(violations)
        self.retry_after = retry_after

    @classmethod
    def from_rpc(cls, error: grpc.RpcError) -> QwireError:
        """Reads a failed call of either gRPC flavour; details that can't be read are left out."""
        code, text, metadata = _parts(error)
        for key, value in metadata:
            if key == DETAILS_KEY and isinstance(value, bytes):
                try:
                    return cls._from_status(code, status_pb2.Status.FromString(value))
                except DecodeError:
                    break
        return cls(code, text)

    @classmethod
    def _from_status(cls, code: grpc.StatusCode, status: status_pb2.Status) -> QwireError:
        reason, retry_after = "", None
        violations: list[FieldViolation] = []
        for detail in status.details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo()
                detail.Unpack(info)
                reason = info.reason
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad = error_details_pb2.BadRequest()
                detail.Unpack(bad)
                violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo()
                detail.Unpack(retry)
                retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        return cls(code, status.message, reason=reason, violations=violations, retry_after=retry_after)

    def under(self, path: str) -> QwireError:
        """The same error about a request that is a field of another: its violations named from there."""
        if not self.violations:
            return self
        violations = [FieldViolation(f"{path}.{found.field}", found.description) for found in self.violations]
        return QwireError(
            self.code, self.message, reason=self.reason, violations=violations, retry_after=self.retry_after
        )

    def status_bytes(self) -> bytes:
        """The `google.rpc.Status` that carries this error, serialized."""
        return _status_bytes(self.code, self.message, self.reason, tuple(self.violations), self.retry_after)

    def trailing_metadata(self, remaining: float | None = None) -> tuple[tuple[str, str | bytes], ...]:
        """What a server sends along: the details, and the pushback that gRPC's own retries obey.

        Args:
            remaining: seconds until the call's deadline. Where it would pass first, gRPC is told not to try again, or
                the caller would hear of the refusal only then.
        """
        metadata: list[tuple[str, str | bytes]] = [(DETAILS_KEY, self.status_bytes())]
        if self.retry_after is not None:
            in_time = remaining is None or self.retry_after < remaining
            metadata.append((PUSHBACK_KEY, str(round(self.retry_after * 1000)) if in_time else DONT_RETRY))
        return tuple(metadata)


@lru_cache(maxsize=1024)
def _status_bytes(
    code: grpc.StatusCode,
    message: str,
    reason: str,
    violations: tuple[FieldViolation, ...],
    retry_after: float | None,
) -> bytes:
    """Remembered, since a server under overload says the same a thousand times a second."""
    status = status_pb2.Status(code=code.value[0], message=message)
    if reason:
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN))
    if violations:
        bad = error_details_pb2.BadRequest()
        for violation in violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        status.details.add().Pack(bad)
    if retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(retry_after * 1e9))
        status.details.add().Pack(retry)
    data: bytes = status.SerializeToString()
    return data


def _cut(text: str, limit: int) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= limit else data[: limit - 3].decode(errors="ignore") + "..."


def _first_that_fit(violations: Sequence[FieldViolation]) -> tuple[FieldViolation, ...]:
    found: list[FieldViolation] = []
    room = MAX_VIOLATIONS_BYTES
    for violation in violations:
        # One takes half of the room at most, so that a long one never leaves an answer without any.
        shown = FieldViolation(_cut(violation.field, 256), _cut(violation.description, MAX_VIOLATIONS_BYTES // 2 - 256))
        room -= len(shown.field.encode()) + len(shown.description.encode()) + 8  # 8: tags and lengths
        if room < 0:
            break
        found.append(shown)
    return tuple(found)


def _parts(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, Iterable[tuple[str, str | bytes]]]:
    if isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        return error.code(), error.details() or "", tuple(error.trailing_metadata() or ())
    return grpc.StatusCode.UNKNOWN, str(error), ()
