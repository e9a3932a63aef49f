"""Row 26, and constraints of every kind through real processes."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import jsonschema
import pytest

from qwire import AsyncClient, Client, QwireError, Reason
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import models_pb2
from tests.helpers.stacks import RunningStack, eventually

PROMPT = list(range(60, 93))
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["the", "inner"]},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 4},
    },
    "required": ["id", "kind"],
    "additionalProperties": False,
}
ENTITY = "(a|bc){2,5}!"


def run(client: Client, **options: Any) -> Any:
    return client.generate(**{"token_ids": PROMPT, "max_tokens": 80, **options}).read()


def reason(generation: Any, choice: int = 0) -> pb.FinishReason.ValueType:
    found: pb.FinishReason.ValueType = generation.choices[choice].finished.reason
    return found


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.3, "seed": 5, "repetition_penalty": 1.2}])
def test_every_kind_holds(client: Client, sampling: dict[str, Any]) -> None:
    done = run(client, json_schema=SCHEMA, **sampling)
    jsonschema.validate(json.loads(done.text), SCHEMA)
    assert reason(done) == pb.FINISH_REASON_CONSTRAINT
    done = run(client, regex=ENTITY, **sampling)
    assert re.fullmatch(ENTITY, done.text)
    assert reason(done) == pb.FINISH_REASON_CONSTRAINT
    assert run(client, choice=["yes", "no", "perhaps"], **sampling).text in ("yes", "no", "perhaps")
    done = run(client, grammar='start: "<" inner ">"\ninner: /[a-z]/ | start', **sampling)
    assert re.fullmatch("<+[a-z]>+", done.text) or reason(done) == pb.FINISH_REASON_LENGTH
    done = run(client, json_object=True, **sampling)
    assert done.text.startswith("{")
    if reason(done) != pb.FINISH_REASON_LENGTH:
        assert isinstance(json.loads(done.text), dict)


def test_choices_streams_and_answers_at_once_agree(client: Client, tiny: RunningStack) -> None:
    options: dict[str, Any] = {"json_schema": json.dumps(SCHEMA), "n": 3, "seed": 9, "temperature": 1.2, "logprobs": 2}
    three = run(client, **options)
    assert len({tuple(choice.token_ids) for choice in three.choices.values()}) > 1
    once = client.generate_once(token_ids=PROMPT, max_tokens=80, **options)
    assert [choice.text for choice in once.choices] == [three.choices[index].text for index in range(3)]
    assert [list(choice.logprobs) for choice in once.choices] == [three.choices[i].logprobs for i in range(3)]
    for index in range(3):
        jsonschema.validate(json.loads(three.choices[index].text), SCHEMA)
    assert run(client, **{**options, "n": 1}).choices[0].token_ids == three.choices[0].token_ids

    async def by_async() -> str:
        async with AsyncClient(tiny.address) as async_client:
            answer = await async_client.generate_once(token_ids=PROMPT, max_tokens=80, **{**options, "n": 1})
            return answer.choices[0].text

    assert asyncio.run(by_async()) == three.choices[0].text
    # Log-probabilities are those before the mask: what isn't allowed shows among the alternatives.
    assert any(item.top[0].token_id != item.drawn.token_id for item in three.choices[0].logprobs)


def test_company_changes_nothing(client: Client) -> None:
    kinds: list[dict[str, Any]] = [{"json_schema": SCHEMA}, {"regex": "([a-z]{2} ){9}"}, {"choice": ["one", "two"]}, {}]
    every = [
        {**kind, "temperature": 1.0, "seed": seed, "frequency_penalty": 0.4, "max_tokens": 40}
        for kind in kinds
        for seed in range(3)
    ]
    alone = [run(client, **options).token_ids for options in every]
    with ThreadPoolExecutor(len(every)) as pool:
        assert list(pool.map(lambda options: run(client, **options).token_ids, every)) == alone


def test_the_end_is_the_models_where_it_has_a_choice(client: Client) -> None:
    (eos,) = client.model().eos_token_ids
    eager = {"temperature": 0, "logit_bias": {eos: 100.0}}
    done = run(client, regex="a{3,9}", **eager)
    assert (done.text, reason(done)) == ("aaa", pb.FINISH_REASON_EOS)
    done = run(client, regex="a{3,9}", min_tokens=5, **eager)
    assert (len(done.text), reason(done)) == (5, pb.FINISH_REASON_EOS)
    done = run(client, regex="a{3,9}", ignore_eos=True, **eager)
    assert (len(done.text), reason(done)) == (9, pb.FINISH_REASON_CONSTRAINT)
    done = run(client, regex="aaa", min_tokens=20, **eager)
    assert (done.text, reason(done)) == ("aaa", pb.FINISH_REASON_CONSTRAINT)
    done = run(client, regex="a{3,9}", temperature=0, max_tokens=2)
    assert (done.text, reason(done)) == ("aa", pb.FINISH_REASON_LENGTH)
    done = run(client, regex="[a-z]+!", temperature=0, stop=["b", "c"], allowed_token_ids=[97, 98])
    assert reason(done) in (pb.FINISH_REASON_STOP_STRING, pb.FINISH_REASON_LENGTH)


def test_a_dead_end_says_so_and_the_other_choices_go_on(client: Client) -> None:
    (a,) = client.encode("a", special_tokens_as_text=True)
    done = run(client, regex="ab", allowed_token_ids=[a])
    assert (done.text, reason(done)) == ("a", pb.FINISH_REASON_DEAD_END)
    done = run(client, regex="ab", allowed_token_ids=[0], n=2)
    assert [reason(done, index) for index in (0, 1)] == [pb.FINISH_REASON_DEAD_END] * 2
    assert done.choices[0].token_ids == []
    done = run(client, regex="a(b)?", allowed_token_ids=[a])
    assert (done.text, reason(done)) == ("a", pb.FINISH_REASON_CONSTRAINT)
    done = run(client, allowed_token_ids=[a], bad_words=["a"])
    assert reason(done) == pb.FINISH_REASON_DEAD_END


def nested(depth: int) -> str:
    return '{"type": "object", "properties": {"a": ' * depth + "{}" + "}}" * depth


LONG_CHAIN = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000)) + 'r5000: "a"'
REFUSED: list[dict[str, Any]] = [
    {"json_schema": nested(400)},
    {"json_schema": "{"},
    {"regex": "(a"},
    {"grammar": "start: start"},
    {"grammar": LONG_CHAIN},  # overflows the library's stack
]
RUNAWAYS: list[dict[str, Any]] = [
    {"regex": "((a{1,100}){1,100}){1,100}"},
    {"grammar": 'start: s\ns: s s | "a" | ""'},
]


def test_hostile_ones_are_refused_or_stopped_alone(client: Client, tiny: RunningStack) -> None:
    (a,) = client.encode("a", special_tokens_as_text=True)
    endless = {"temperature": 0, "logit_bias": {a: 100.0}, "max_tokens": 1000}
    neighbour: dict[str, Any] = {"temperature": 1.0, "max_tokens": 150, "ignore_eos": True}
    neighbours = [{**neighbour, "seed": seed} for seed in range(3)] + [{"json_schema": SCHEMA, "temperature": 0}]
    alone = [run(client, **options).token_ids for options in neighbours]
    pids = tiny.pids
    with ThreadPoolExecutor(16) as pool:
        beside = [pool.submit(run, client, **options) for options in neighbours]
        refused = [pool.submit(run, client, **kind) for kind in REFUSED]
        stopped = [pool.submit(run, client, **kind, **endless) for kind in RUNAWAYS]
        recursive = pool.submit(run, client, grammar='start: s\ns: s "a" | "b"', **{**endless, "max_tokens": 120})
        for kind, call in zip(REFUSED, refused, strict=True):
            with pytest.raises(QwireError) as caught:
                call.result()
            assert (caught.value.code, caught.value.reason) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                Reason.INVALID_CONSTRAINT,
            )
            assert [violation.field for violation in caught.value.violations] == [f"constraint.{next(iter(kind))}"]
            assert caught.value.retry_after is None
        for call in stopped:
            with pytest.raises(QwireError) as caught:
                call.result()
            assert (caught.value.code, caught.value.reason) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                Reason.CONSTRAINT_TOO_COMPLEX,
            )
        assert recursive.result().text == "b" + "a" * 119
        assert [call.result().token_ids for call in beside] == alone
    assert tiny.pids == pids
    assert eventually(lambda: tiny.state().blocks_in_use == 0, 10)


def test_what_cant_be(client: Client) -> None:
    assert models_pb2.CAPABILITY_CONSTRAINTS in client.model().capabilities
    with pytest.raises(QwireError) as caught:
        run(client, regex="a", free_thinking=True)
    assert [violation.field for violation in caught.value.violations] == ["constraint.free_thinking"]
    with pytest.raises(QwireError) as caught:
        client.generate_once(token_ids=PROMPT, choice=["", "b"], top_p=3)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["request.sampling.top_p", "request.constraint.choice.texts[0]"]
    with pytest.raises(QwireError) as caught:
        client.generate_once(token_ids=PROMPT, regex="(")
    assert caught.value.violations[0].field == "request.constraint.regex"


def test_a_call_that_is_cancelled_while_its_constraint_compiles(client: Client, tiny: RunningStack) -> None:
    slow = json.dumps({"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.{{{200 + i}}}"} for i in range(20)]})
    with pytest.raises(QwireError) as caught:
        client.generate(token_ids=PROMPT, json_schema=slow, timeout=0.3).read()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert run(client, regex="abc").text == "abc"
    assert eventually(lambda: tiny.state().blocks_in_use == 0, 10)
