"""Resume tokens: what they pin, what they notice, and whose they are."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwire.errors import QwireError, Reason
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import resume_pb2, worker_pb2
from router import resume
from router.validation import MAX_REQUEST_ID

SAMPLING = pb.SamplingParams(temperature=0.5, top_p=1, top_k=3, min_p=0, repetition_penalty=1, seed=2**64 - 1, n=2)
STOP = pb.StopOptions(max_tokens=8, strings=["x" * 256] * 16)
DIGEST = resume.digest(SAMPLING, STOP, pb.OutputOptions(), pb.Constraint(), [5])


def token(secret: str = "", **changes: object) -> bytes:
    values: dict[str, object] = {
        "numerics_id": "ab" * 32,
        "prompt_ids": [1, 2, 3],
        "parameters": DIGEST,
        "sampling": SAMPLING,
        "max_tokens": 8,
        "template_time": 1_700_000_000,
        **changes,
    }
    return resume.issue(secret, **values)  # type: ignore[arg-type]


def refused(data: bytes, secret: str = "") -> bool:
    try:
        resume.read(secret, data)
    except QwireError as error:
        return (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.RESUME_MISMATCH)
    return False


@pytest.mark.parametrize("secret", ["", "s3cret"])
def test_a_token_says_what_the_request_left_out(secret: str) -> None:
    data = token(secret)
    assert len(data) <= resume.MAX_TOKEN_BYTES / 2
    state = resume.read(secret, data)
    assert (state.numerics_id, state.max_tokens, state.template_time) == ("ab" * 32, 8, 1_700_000_000)
    full = resume.filled(pb.GenerateRequest(request_id="r" * MAX_REQUEST_ID), state)
    assert (full.sampling.seed, full.sampling.n, full.stop.max_tokens) == (2**64 - 1, 2, 8)


def test_what_the_request_says_is_not_overruled() -> None:
    asked = pb.GenerateRequest(sampling=pb.SamplingParams(temperature=0.25), stop=pb.StopOptions(max_tokens=3))
    full = resume.filled(asked, resume.read("", token()))
    assert (full.sampling.temperature, full.stop.max_tokens, full.sampling.top_k) == (0.25, 3, 3)
    assert asked.sampling.HasField("top_k") is False


def test_tokens_of_others_are_refused() -> None:
    assert refused(token("a"), "b")
    assert refused(token("a"), "")
    assert refused(token(""), "a")
    assert refused(b"")
    assert refused(b"nonsense" * 200)
    newer = resume_pb2.ResumeState(version=resume.VERSION + 1).SerializeToString()
    assert refused(resume_pb2.ResumeToken(mac=resume._mac("", newer), state=newer).SerializeToString())


@given(st.data())
def test_a_damaged_token_is_refused(data: st.DataObject) -> None:
    whole = token()
    index = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[index] ^= data.draw(st.integers(1, 255))
    if not refused(bytes(damaged)):  # a byte of the envelope that protobuf skips
        assert resume.read("", bytes(damaged)) == resume.read("", whole)


def test_another_prompt_or_other_parameters_are_noticed() -> None:
    state = resume.read("", token())
    resume.check_same(state, [1, 2, 3], DIGEST)
    others = [
        resume.digest(pb.SamplingParams(temperature=0.6), STOP, pb.OutputOptions(), pb.Constraint(), [5]),
        resume.digest(SAMPLING, pb.StopOptions(max_tokens=8), pb.OutputOptions(), pb.Constraint(), [5]),
        resume.digest(SAMPLING, STOP, pb.OutputOptions(text=False), pb.Constraint(), [5]),
        resume.digest(SAMPLING, STOP, pb.OutputOptions(), pb.Constraint(regex="a"), [5]),
        resume.digest(SAMPLING, STOP, pb.OutputOptions(), pb.Constraint(), [6]),
    ]
    for prompt, parameters in [([1, 2], DIGEST), *(([1, 2, 3], other) for other in others)]:
        with pytest.raises(QwireError) as caught:
            resume.check_same(state, prompt, parameters)
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION


def test_choices_that_no_stream_could_have_delivered() -> None:
    fine = [pb.ResumeChoice(token_ids=[1] * 8), pb.ResumeChoice(finished=True)]
    resume.check_choices(fine, SAMPLING, STOP, 10)
    for choices, field in (
        (fine[:1], "resume.choices"),
        ([*fine, *fine], "resume.choices"),
        ([pb.ResumeChoice(token_ids=[1] * 9), fine[1]], "resume.choices[0].token_ids"),
        ([fine[0], pb.ResumeChoice(token_ids=[10])], "resume.choices[1].token_ids"),
    ):
        with pytest.raises(QwireError) as caught:
            resume.check_choices(choices, SAMPLING, STOP, 10)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in caught.value.violations] == [field]


def test_how_a_choice_has_ended() -> None:
    params = worker_pb2.ResolvedParams(max_tokens=3, stop_token_ids=[7, 8], eos_token_ids=[8, 9])
    for ids, end in (
        ([], worker_pb2.END_REASON_UNSPECIFIED),
        ([7, 1], worker_pb2.END_REASON_UNSPECIFIED),
        ([1, 7], worker_pb2.END_REASON_STOP_TOKEN),
        ([8], worker_pb2.END_REASON_STOP_TOKEN),
        ([1, 1, 9], worker_pb2.END_REASON_EOS),
        ([1, 1, 1], worker_pb2.END_REASON_LENGTH),
    ):
        assert resume.end_of(ids, params) == end
