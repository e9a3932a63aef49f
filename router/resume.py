"""Resume tokens: what lets any router of a fleet go on with a stream that another one began.

A token holds what the request alone doesn't say: the numerics, the values that defaults had, the template's clock, and
digests of prompt and parameters, so that a request which is another one is noticed. The client sends the request again
together with the token and what it holds of each choice.
"""

from __future__ import annotations

import hashlib
import hmac
from array import array
from collections.abc import Sequence
from sys import byteorder

import grpc
from google.protobuf.message import DecodeError

from qwire.errors import FieldViolation, QwireError, Reason
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import resume_pb2, worker_pb2
from router.validation import Violations

VERSION = 1
MAC_BYTES = 16
MAX_TOKEN_BYTES = 1024

_PINNED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "n")
"""Sampling values that have defaults."""


def issue(
    secret: str,
    *,
    numerics_id: str,
    prompt_ids: Sequence[int],
    parameters: bytes,
    sampling: pb.SamplingParams,
    max_tokens: int,
    template_time: int | None,
) -> bytes:
    """The token of a stream; `parameters` is what `digest` says of them."""
    state = resume_pb2.ResumeState(
        version=VERSION,
        numerics_id=numerics_id,
        prompt_digest=prompt_digest(prompt_ids),
        parameters_digest=parameters,
        template_time=template_time,
        sampling=pb.SamplingParams(**{name: getattr(sampling, name) for name in _PINNED}),
        max_tokens=max_tokens,
    ).SerializeToString(deterministic=True)
    return resume_pb2.ResumeToken(mac=_mac(secret, state), state=state).SerializeToString()


def read(secret: str, data: bytes) -> resume_pb2.ResumeState:
    """What a token says. Raises QwireError FAILED_PRECONDITION where it isn't one of this fleet."""
    try:
        token = resume_pb2.ResumeToken.FromString(data[:MAX_TOKEN_BYTES])
        if hmac.compare_digest(token.mac, _mac(secret, token.state)):
            state = resume_pb2.ResumeState.FromString(token.state)
            if state.version == VERSION:
                return state
    except DecodeError:
        pass
    raise _mismatch("the token was not given out by a router of this fleet, or is damaged, or of another release")


def filled(request: pb.GenerateRequest, state: resume_pb2.ResumeState) -> pb.GenerateRequest:
    """The request with the values that the first stream had where it leaves them to defaults."""
    full = pb.GenerateRequest()
    full.CopyFrom(request)
    full.sampling.CopyFrom(state.sampling)
    full.sampling.MergeFrom(request.sampling)
    if not full.stop.HasField("max_tokens"):
        full.stop.max_tokens = state.max_tokens
    return full


def digest(
    sampling: pb.SamplingParams,
    stop: pb.StopOptions,
    output: pb.OutputOptions,
    constraint: pb.Constraint,
    eos_token_ids: Sequence[int],
) -> bytes:
    """SHA-256 of every resolved parameter."""
    eos = pb.StopOptions(token_ids=eos_token_ids)
    parts = [message.SerializeToString(deterministic=True) for message in (sampling, stop, output, constraint, eos)]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


def prompt_digest(ids: Sequence[int]) -> bytes:
    """SHA-256 of ids as little-endian u32."""
    numbers = array("I", ids)
    if byteorder == "big":
        numbers.byteswap()
    return hashlib.sha256(numbers.tobytes()).digest()


def check_same(state: resume_pb2.ResumeState, prompt_ids: Sequence[int], parameters: bytes) -> None:
    """Raises QwireError FAILED_PRECONDITION where the request isn't the one that began the stream."""
    if state.prompt_digest != prompt_digest(prompt_ids):
        raise _mismatch("the prompt isn't that of the stream which the token is of")
    if state.parameters_digest != parameters:
        raise _mismatch("the parameters are not those of the stream which the token is of")


def check_choices(
    choices: Sequence[pb.ResumeChoice], sampling: pb.SamplingParams, stop: pb.StopOptions, vocab_size: int
) -> None:
    """Raises QwireError INVALID_ARGUMENT where no stream of these parameters could have delivered the choices."""
    found = Violations()
    if len(choices) != sampling.n:
        found.add("resume.choices", f"must be one a choice, {sampling.n}, not {len(choices)}")
    for index, choice in enumerate(choices[: sampling.n]):
        path = f"resume.choices[{index}].token_ids"
        if len(choice.token_ids) > stop.max_tokens:
            found.add(path, f"must be at most max_tokens {stop.max_tokens}, not {len(choice.token_ids)}")
        elif (highest := max(choice.token_ids, default=0)) >= vocab_size:
            found.add(path, f"must be below the vocabulary size {vocab_size}, not {highest}")
    found.raise_if_any()


def end_of(ids: Sequence[int], params: worker_pb2.ResolvedParams) -> worker_pb2.EndReason.ValueType:
    """How a choice that has these ids has ended, as a worker would say; unspecified if it hasn't."""
    if ids and ids[-1] in params.stop_token_ids:
        return worker_pb2.END_REASON_STOP_TOKEN
    if ids and ids[-1] in params.eos_token_ids:
        return worker_pb2.END_REASON_EOS
    if len(ids) >= params.max_tokens:
        return worker_pb2.END_REASON_LENGTH
    return worker_pb2.END_REASON_UNSPECIFIED


def _mac(secret: str, state: bytes) -> bytes:
    return hmac.digest(secret.encode(), b"qwire resume\0" + state, hashlib.sha256)[:MAC_BYTES]


def _mismatch(message: str) -> QwireError:
    return QwireError(
        grpc.StatusCode.FAILED_PRECONDITION,
        message,
        reason=Reason.RESUME_MISMATCH,
        violations=[FieldViolation("resume.token", message)],
    )
