"""Rows 20 to 23: every bad field is named, nothing unset is taken for zero, and the limits are those documented."""

from __future__ import annotations

import dataclasses
import math
import time

import grpc
import pytest

from qwire.errors import QwireError, Reason
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import models_pb2
from qwire.v1 import tokenizer_pb2 as tok
from router.config import RouterConfig
from router.validation import check, check_prompt, resolve

CONFIG = RouterConfig(worker=("unix:w",), tokenizer="unix:t")
MODEL = models_pb2.ModelInfo(
    name="m",
    context_length=100,
    vocab_size=50,
    default_sampling=models_pb2.DefaultSampling(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1),
)


def request(**fields: object) -> pb.GenerateRequest:
    if not {"text", "token_ids", "chat"} & fields.keys():
        fields["text"] = "hello"
    return pb.GenerateRequest(**fields)  # type: ignore[arg-type]


def violations(bad: pb.GenerateRequest) -> list[str]:
    with pytest.raises(QwireError) as caught:
        check(bad, CONFIG)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.retry_after is None
    assert all(violation.description for violation in caught.value.violations)
    return [violation.field for violation in caught.value.violations]


def user(text: str | None = "hi", **more: object) -> tok.Message:
    return tok.Message(role=tok.ROLE_USER, content=text, **more)  # type: ignore[arg-type]


def texts(*choices: str) -> pb.Constraint:
    return pb.Constraint(choice=pb.Constraint.Choice(texts=choices))


def test_a_plain_request_passes() -> None:
    check(request(), CONFIG)
    check(request(chat=tok.Chat(messages=[user()])), CONFIG)
    check(request(token_ids=tok.TokenIds(ids=[1])), CONFIG)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"text": ""}, ["text"]),
        ({"token_ids": tok.TokenIds()}, ["token_ids.ids"]),
        ({"chat": tok.Chat()}, ["chat.messages"]),
        ({"chat": tok.Chat(messages=[tok.Message(content="x")])}, ["chat.messages[0].role"]),
        ({"chat": tok.Chat(messages=[user(None)])}, ["chat.messages[0].content"]),
        ({"chat": tok.Chat(messages=[user()] * 1025)}, ["chat.messages"]),
        ({"chat": tok.Chat(messages=[user()], tools=[tok.Tool(name="f")] * 129)}, ["chat.tools"]),
        (
            {"chat": tok.Chat(messages=[user()], tools=[tok.Tool(parameters_json="[1]")])},
            ["chat.tools[0].name", "chat.tools[0].parameters_json"],
        ),
        (
            {"chat": tok.Chat(messages=[user(tool_calls=[tok.ToolCall(name="f", arguments_json="{}")])])},
            ["chat.messages[0].tool_calls"],
        ),
        (
            {
                "chat": tok.Chat(
                    messages=[user()], template_options=tok.TemplateOptions(arguments_json='{"messages": []}')
                )
            },
            ["chat.template_options.arguments_json"],
        ),
        ({"request_id": ""}, ["request_id"]),
        ({"request_id": "a b"}, ["request_id"]),
        ({"request_id": "x" * 129}, ["request_id"]),
        ({"prefix_cache": pb.PrefixCacheOptions(scope="x" * 129)}, ["prefix_cache.scope"]),
        ({"continuity": 9}, ["continuity"]),
        *(({"sampling": pb.SamplingParams(temperature=t)}, ["sampling.temperature"]) for t in (-1, math.nan, math.inf)),
        *(({"sampling": pb.SamplingParams(top_p=p)}, ["sampling.top_p"]) for p in (0, 1.1, -0.1, math.nan)),
        *(({"sampling": pb.SamplingParams(min_p=p)}, ["sampling.min_p"]) for p in (1, -0.1, math.nan)),
        ({"sampling": pb.SamplingParams(top_k=-1)}, ["sampling.top_k"]),
        *(({"sampling": pb.SamplingParams(n=n)}, ["sampling.n"]) for n in (0, -1, 17)),
        ({"sampling": pb.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))}, ["sampling.logit_bias"]),
        ({"sampling": pb.SamplingParams(bad_words=["x"] * 65)}, ["sampling.bad_words"]),
        (
            {"sampling": pb.SamplingParams(bad_words=["", "x" * 257])},
            ["sampling.bad_words[0]", "sampling.bad_words[1]"],
        ),
        *(({"sampling": pb.SamplingParams(logit_bias={3: b})}, ["sampling.logit_bias[3]"]) for b in (101, math.nan)),
        *(({"sampling": pb.SamplingParams(repetition_penalty=p)}, ["sampling.repetition_penalty"]) for p in (0, 11)),
        *(({"sampling": pb.SamplingParams(presence_penalty=p)}, ["sampling.presence_penalty"]) for p in (-3, math.nan)),
        ({"stop": pb.StopOptions(min_tokens=5, max_tokens=4)}, ["stop.min_tokens"]),
        *(({"stop": pb.StopOptions(max_tokens=n)}, ["stop.max_tokens"]) for n in (0, -5)),
        ({"stop": pb.StopOptions(min_tokens=-1)}, ["stop.min_tokens"]),
        ({"stop": pb.StopOptions(strings=["a"] * 17)}, ["stop.strings"]),
        ({"stop": pb.StopOptions(strings=["", "a" * 257])}, ["stop.strings[0]", "stop.strings[1]"]),
        ({"stop": pb.StopOptions(token_ids=range(65))}, ["stop.token_ids"]),
        *(({"output": pb.OutputOptions(logprobs=n)}, ["output.logprobs"]) for n in (-1, 21)),
        ({"constraint": pb.Constraint()}, ["constraint"]),
        ({"constraint": pb.Constraint(free_thinking=True)}, ["constraint"]),
        *(
            ({"constraint": constraint}, [f"constraint.{constraint.WhichOneof('kind')}"])
            for text in ("", "a" * (128 * 1024 + 1))
            for constraint in (pb.Constraint(json_schema=text), pb.Constraint(regex=text), pb.Constraint(grammar=text))
        ),
        ({"constraint": texts()}, ["constraint.choice.texts"]),
        ({"constraint": texts(*["a"] * 1025)}, ["constraint.choice.texts"]),
        ({"constraint": texts("a" * 100_000, "b" * 100_000)}, ["constraint.choice.texts"]),
        ({"constraint": texts("a", "", "")}, ["constraint.choice.texts[1]", "constraint.choice.texts[2]"]),
    ],
)
def test_bad_values(fields: dict[str, object], named: list[str]) -> None:
    assert violations(request(**fields)) == named


def test_prompt_logprobs_are_for_calls_that_answer_once() -> None:
    asked = request(output=pb.OutputOptions(prompt_logprobs=3))
    assert violations(asked) == ["output.prompt_logprobs"]
    check(asked, CONFIG, once=True)
    for wrong in (-1, 21):
        with pytest.raises(QwireError) as caught:
            check(request(output=pb.OutputOptions(prompt_logprobs=wrong)), CONFIG, once=True)
        assert [violation.field for violation in caught.value.violations] == ["output.prompt_logprobs"]
    small = dataclasses.replace(CONFIG, max_prompt_logprobs=40)
    check_prompt(asked, [1] * 10, MODEL, small)
    with pytest.raises(QwireError) as caught:
        check_prompt(asked, [1] * 11, MODEL, small)
    assert "44" in caught.value.violations[0].description and "40" in caught.value.violations[0].description


def test_no_input() -> None:
    assert violations(pb.GenerateRequest()) == ["input"]


def test_every_violation_is_named_at_once() -> None:
    bad = request(
        text="", sampling=pb.SamplingParams(temperature=math.nan, top_p=0, top_k=-1), stop=pb.StopOptions(max_tokens=0)
    )
    assert violations(bad) == ["text", "sampling.temperature", "sampling.top_p", "sampling.top_k", "stop.max_tokens"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"adapter": "a"}, "adapter"),
    ],
)
def test_what_this_release_lacks_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(QwireError) as caught:
        check(request(**fields), CONFIG)
    assert [violation.field for violation in caught.value.violations] == [named]
    assert caught.value.reason == Reason.NOT_IN_THIS_RELEASE


@pytest.mark.parametrize(
    ("fields", "prompt", "named", "limit"),
    [
        ({}, [1] * 100, "text", "100"),
        ({"stop": pb.StopOptions(max_tokens=91)}, [1] * 10, "stop.max_tokens", "at most 90"),
        ({"token_ids": tok.TokenIds(ids=[1, 50])}, [1, 50], "token_ids.ids[1]", "50"),
        ({"stop": pb.StopOptions(token_ids=[3, 99])}, [1], "stop.token_ids[1]", "99"),
        ({"sampling": pb.SamplingParams(allowed_token_ids=[50])}, [1], "sampling.allowed_token_ids[0]", "50"),
        ({"sampling": pb.SamplingParams(logit_bias={77: 1})}, [1], "sampling.logit_bias[77]", "77"),
        ({"stop": pb.StopOptions(min_tokens=91)}, [1] * 10, "stop.min_tokens", "90"),
        ({}, [], "text", "no tokens"),
        ({"constraint": texts("a")}, [1], "constraint", "m"),
    ],
)
def test_what_depends_on_the_model(fields: dict[str, object], prompt: list[int], named: str, limit: str) -> None:
    with pytest.raises(QwireError) as caught:
        check_prompt(request(**fields), prompt, MODEL, CONFIG)
    (violation,) = caught.value.violations
    assert violation.field == named
    assert limit in violation.description


def test_constraints_in_range_pass() -> None:
    able = models_pb2.ModelInfo()
    able.CopyFrom(MODEL)
    able.capabilities.append(models_pb2.CAPABILITY_CONSTRAINTS)
    for constraint in (
        texts("a", "a"),
        pb.Constraint(json_object=pb.Constraint.JsonObject(), free_thinking=True),
        pb.Constraint(json_schema="true"),
        pb.Constraint(regex="a" * 128 * 1024),
    ):
        check(request(constraint=constraint), CONFIG)
        check_prompt(request(constraint=constraint), [1], able, CONFIG)


def test_the_context_may_be_filled_to_the_last_token() -> None:
    check_prompt(request(stop=pb.StopOptions(max_tokens=90)), [1] * 10, MODEL, CONFIG)
    check_prompt(request(), [1] * 99, MODEL, CONFIG)


def test_unset_takes_the_models_default_and_zero_is_kept() -> None:
    sampling, stop = resolve(request(), 10, MODEL, CONFIG)
    assert sampling.temperature == pytest.approx(0.6)
    assert (sampling.top_k, sampling.n, stop.max_tokens) == (20, 1, 90)
    zero = pb.SamplingParams(temperature=0, top_k=0, min_p=0, seed=0)
    sampling, _ = resolve(request(sampling=zero), 10, MODEL, CONFIG)
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0, 0, 0)
    assert sampling.top_p == pytest.approx(0.95)


def test_an_unset_seed_follows_the_callers_request_id() -> None:
    def seed(**fields: object) -> int:
        return resolve(request(**fields), 10, MODEL, CONFIG)[0].seed

    assert seed(request_id="a") == seed(request_id="a") != seed(request_id="b")
    assert seed() != seed()


def test_more_tool_calls_than_a_message_may_have() -> None:
    calls = [tok.ToolCall(name="f", arguments_json="{}")] * 129
    message = tok.Message(role=tok.ROLE_ASSISTANT, tool_calls=calls)
    assert violations(request(chat=tok.Chat(messages=[message]))) == ["chat.messages[0].tool_calls"]


def test_a_million_wrong_things_are_answered_at_once_and_the_answer_fits_trailers() -> None:
    bad = request(chat=tok.Chat(messages=[tok.Message(tool_calls=[tok.ToolCall()] * 1000)] * 1000))
    started = time.process_time()
    with pytest.raises(QwireError) as caught:
        check(bad, CONFIG)
    assert time.process_time() - started < 1
    assert caught.value.violations[0].field == "chat.messages[0].role"
    assert len(caught.value.message) + len(caught.value.status_bytes()) < 6000
