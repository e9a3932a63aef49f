"""Keyword arguments to messages: presence is kept, and nothing is dropped."""

from __future__ import annotations

from typing import Any

import pytest

from qwire._chat import chat
from qwire._request import GenerateOptions, generate_request
from qwire.v1 import generation_pb2 as gen
from qwire.v1 import tokenizer_pb2 as tok


def build(prompt: str | None = None, **options: Any) -> gen.GenerateRequest:
    return generate_request(prompt, options)  # type: ignore[arg-type]


def test_unset_stays_unset() -> None:
    assert build("hi") == gen.GenerateRequest(text="hi")
    assert not build("hi").HasField("sampling")
    nothing = dict.fromkeys(GenerateOptions.__annotations__)
    assert build("hi", **nothing) == gen.GenerateRequest(text="hi")


def test_zero_is_not_unset() -> None:
    request = build(
        "", temperature=0, top_k=0, seed=0, ignore_eos=False, text=False, bypass=False, scope="", priority=0
    )
    assert request.WhichOneof("input") == "text"
    present = {
        "request": [field.name for field, _ in request.ListFields()],
        "sampling": [field.name for field, _ in request.sampling.ListFields()],
        "stop": [field.name for field, _ in request.stop.ListFields()],
        "output": [field.name for field, _ in request.output.ListFields()],
        "prefix_cache": [field.name for field, _ in request.prefix_cache.ListFields()],
    }
    assert present == {
        "request": ["text", "sampling", "stop", "output", "priority", "prefix_cache"],
        "sampling": ["temperature", "top_k", "seed"],
        "stop": ["ignore_eos"],
        "output": ["text"],
        "prefix_cache": ["bypass", "scope"],
    }


def test_every_option_has_its_field() -> None:
    request = build(
        token_ids=[1, 2], model="m", request_id="r", temperature=0.5, top_p=0.25, top_k=3, min_p=0.125,
        repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=-0.5, logit_bias={7: 1.5}, seed=2**64 - 1, n=2,
        stop="x", stop_token_ids=[5], max_tokens=9, min_tokens=1, ignore_eos=True, include_stop=True, text=False,
        ids=True, logprobs=2, priority=-1, bypass=True, scope="s",
    )  # fmt: skip
    assert request == gen.GenerateRequest(
        model="m", request_id="r", token_ids=tok.TokenIds(ids=[1, 2]), priority=-1,
        sampling=gen.SamplingParams(
            temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, repetition_penalty=1.5, frequency_penalty=0.5,
            presence_penalty=-0.5, logit_bias={7: 1.5}, seed=2**64 - 1, n=2,
        ),
        stop=gen.StopOptions(
            strings=["x"], token_ids=[5], max_tokens=9, min_tokens=1, ignore_eos=True, include_stop=True
        ),
        output=gen.OutputOptions(logprobs=2, text=False, token_ids=True),
        prefix_cache=gen.PrefixCacheOptions(bypass=True, scope="s"),
    )  # fmt: skip


def test_constraints() -> None:
    assert build("a", json_schema={"type": "null"}).constraint.json_schema == '{"type": "null"}'
    assert build("a", json_schema="true").constraint.json_schema == "true"
    assert build("a", json_schema=False).constraint.json_schema == "false"
    assert build("a", json_object=True).constraint.WhichOneof("kind") == "json_object"
    assert not build("a", json_object=False).HasField("constraint")
    assert build("a", regex="b", free_thinking=True).constraint == gen.Constraint(regex="b", free_thinking=True)
    assert build("a", grammar="start: /b/").constraint.grammar == "start: /b/"
    assert build("a", choice=["b", "c"]).constraint.choice.texts == ["b", "c"]
    with pytest.raises(ValueError, match="regex and choice"):
        build("a", regex="b", choice=["c"])
    with pytest.raises(TypeError, match="list"):
        build("a", choice="b")


def test_exactly_one_input() -> None:
    inputs: list[dict[str, Any]] = [{}, {"prompt": "a", "chat": "b"}, {"messages": [], "token_ids": []}]
    for options in inputs:
        with pytest.raises(ValueError, match="exactly one"):
            build(**options)
    with pytest.raises(ValueError, match="enable_thinking"):
        build("a", enable_thinking=True)


def test_mistakes() -> None:
    with pytest.raises(TypeError, match="max_token, topp"):
        build("a", topp=1, max_token=2)
    with pytest.raises(ValueError, match="range"):
        build(token_ids=[2**32])
    with pytest.raises(TypeError):
        build("a", max_tokens="many")


def test_conversation() -> None:
    request = build(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant", "content": None, "refusal": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"ü": 1, "a": [2]}}},
                    {"id": "c2", "type": "function", "function": {"name": "g", "arguments": '{"b":1}'}},
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
            tok.Message(role=tok.ROLE_USER, content="x"),
        ],
        tools=[{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
        enable_thinking=False,
    )  # fmt: skip
    assert request.chat == tok.Chat(
        messages=[
            tok.Message(role=tok.ROLE_SYSTEM, content="s"),
            tok.Message(role=tok.ROLE_USER, content="ab"),
            tok.Message(
                role=tok.ROLE_ASSISTANT,
                tool_calls=[
                    tok.ToolCall(id="c1", name="f", arguments_json='{"ü": 1, "a": [2]}'),
                    tok.ToolCall(id="c2", name="g", arguments_json='{"b":1}'),
                ],
            ),
            tok.Message(role=tok.ROLE_TOOL, tool_call_id="c1", content="42"),
            tok.Message(role=tok.ROLE_USER, content="x"),
        ],
        tools=[tok.Tool(name="f", description="d", parameters_json='{"type": "object"}')],
        template_options=tok.TemplateOptions(enable_thinking=False),
    )
    assert build(chat="hi").chat == tok.Chat(messages=[tok.Message(role=tok.ROLE_USER, content="hi")])


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "king", "content": "x"}, r"messages\[0\].role must be one of system"),
        ({"content": "x"}, "role must be one of"),
        ({"role": "user", "content": "x", "mood": "good"}, "unknown keys: mood"),
        ({"role": "user", "content": 5}, "content must be a text"),
        ({"role": "user", "content": [{"type": "image_url", "url": "x"}]}, "unknown keys: url"),
        ({"role": "user", "content": [{"type": "image"}]}, r"content\[0\] must be a part of type text"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "tool_call_id must be a text"),
        ({"role": "assistant", "tool_calls": {}}, "must be a list"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "function is missing"),
        ({"role": "assistant", "tool_calls": [{"type": "x", "function": {}}]}, 'must be "function"'),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "name is missing"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}, "must be an object"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": {1}}}}]}, "no JSON"),
        ("hello", "must be an object"),
    ],
)
def test_messages_that_are_refused(message: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        chat([message])


def test_messages_must_be_a_list() -> None:
    with pytest.raises(TypeError, match="list"):
        chat({"role": "user", "content": "x"})  # type: ignore[arg-type]
