"""Compiled constraints and the states that choices begin from, through the helper process and the grammar library."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwire.v1 import generation_pb2 as pb
from tests.constraints.conftest import END_THINK, EOS, THINK, VOCAB, tokenizer_json
from worker.constraints import grammars as module
from worker.constraints.grammars import ConstraintRefused, Grammars, TooManyPending
from worker.constraints.state import GrammarState
from worker.engine.constraint import Standing


def text_ids(text: str) -> list[int]:
    """A text byte by byte: the tiny vocabulary begins with them."""
    return list(text.encode())


def allowed(state: GrammarState) -> set[int]:
    bits = state.mask().bits()
    return {token for token in range(8 * len(bits)) if bits[token // 8] >> token % 8 & 1}


async def begin(grammars: Grammars, **kind: Any) -> GrammarState:
    may_end = kind.pop("may_end", True)
    prompt = kind.pop("prompt", [1])
    if "choice" in kind:
        kind["choice"] = pb.Constraint.Choice(texts=kind["choice"])
    if kind.pop("json_object", False):
        kind["json_object"] = pb.Constraint.JsonObject()
    (state,) = await grammars.begin(pb.Constraint(**kind), prompt, [()], may_end=may_end)
    return state


@pytest.mark.parametrize(
    ("kind", "text", "open_end"),
    [
        ({"regex": "[0-9]{3}-x"}, "123-x", False),
        ({"regex": "a+"}, "aaa", True),
        ({"choice": ["yes", "no.", "a|b", "ü*"]}, "a|b", False),
        ({"choice": ["yes", "no.", "a|b", "ü*"]}, "ü*", False),
        ({"choice": ["yes", "yes!"]}, "yes", True),
        ({"json_object": True}, '{"a": [1, "true", null], "b": {}}', False),
        ({"json_schema": '{"enum": [[1], "the"]}'}, "[1]", False),
        ({"grammar": 'start: "(" start ")" | "x"'}, "((x))", False),
    ],
)
async def test_an_output_of_each_kind(grammars: Grammars, kind: dict[str, Any], text: str, open_end: bool) -> None:
    state = await begin(grammars, **kind)
    standing = Standing.OPEN
    for index, token in enumerate(text_ids(text)):
        assert standing is Standing.OPEN, text[:index]
        assert EOS not in allowed(state) or text[:index] in ("a", "aa")
        assert token in allowed(state)
        standing = state.advance(token)
    if open_end:
        assert standing is Standing.OPEN
        assert EOS in allowed(state)
    else:
        assert standing is Standing.COMPLETE


async def test_nothing_else_is_allowed(grammars: Grammars) -> None:
    state = await begin(grammars, choice=["the", "true"])
    assert allowed(state) == {*text_ids("t"), 256, 257, 258, 259, 260}
    assert state.undrawn() is Standing.STUCK
    assert state.advance(258) is Standing.OPEN
    assert allowed(state) == {*text_ids("u")}


async def test_where_only_the_end_is_left_nothing_is_drawn(grammars: Grammars) -> None:
    state = await begin(grammars, grammar='start: "a" rest\nrest: "b"?')
    assert state.advance(*text_ids("a")) is Standing.OPEN
    assert allowed(state) == {*text_ids("b"), EOS}
    assert state.undrawn() is Standing.COMPLETE
    endless = await begin(grammars, grammar='start: "a" rest\nrest: "b"?', may_end=False)
    endless.advance(*text_ids("a"))
    assert allowed(endless) == {*text_ids("b")}
    assert endless.undrawn() is Standing.COMPLETE
    nothing = await begin(grammars, grammar='start: ""')
    assert nothing.mask().bits() == b""
    assert nothing.undrawn() is Standing.COMPLETE


async def test_forks_go_their_own_ways(grammars: Grammars) -> None:
    state = await begin(grammars, regex="(ab|cd)+")
    first = state.mask()
    twin = state.fork()
    assert twin.mask() is first
    a, c = text_ids("ac")
    state.advance(a)
    twin.advance(c)
    assert allowed(state) == {*text_ids("b")}
    assert allowed(twin) == {*text_ids("d")}
    assert first.bits() == (await begin(grammars, regex="(ab|cd)+")).mask().bits()


async def test_thinking_is_free(grammars: Grammars) -> None:
    state = await begin(grammars, regex="[0-9]", free_thinking=True)
    digits = set(text_ids("0123456789"))
    assert allowed(state) == digits | {THINK}
    thinking = state.fork()
    assert state.advance(*text_ids("7")) is Standing.COMPLETE
    assert thinking.advance(THINK) is Standing.OPEN
    for token in (*text_ids("hm"), EOS + 1):
        assert allowed(thinking) == set(range(8 * -(-VOCAB // 8))) - {EOS}
        assert thinking.advance(token) is Standing.OPEN
    assert thinking.advance(END_THINK) is Standing.OPEN
    assert allowed(thinking) == digits
    opened = await begin(grammars, regex="[0-9]", free_thinking=True, prompt=[THINK, 5, END_THINK, THINK, 7])
    assert EOS not in allowed(opened) and 7 in allowed(opened)
    closed = await begin(grammars, regex="[0-9]", free_thinking=True, prompt=[THINK, 7, END_THINK])
    assert allowed(closed) == digits | {THINK}
    plain = await begin(grammars, regex="[0-9]", prompt=[THINK, 7])
    assert allowed(plain) == digits


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["the", "other", 3]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 40))
def test_states_depend_on_ids_alone(seed: int, cut: int) -> None:
    """Walked with a mask each step, walked without any, replayed after a cut: the same masks; and what comes out is
    valid."""

    async def walk() -> None:
        grammars = Grammars(tokenizer_json(), VOCAB, [EOS])
        try:
            constraint = pb.Constraint(json_schema=json.dumps(SCHEMA))
            (state,) = await grammars.begin(constraint, [1], [()], may_end=True)
            draw, standing = random.Random(seed), Standing.OPEN
            ids: list[int] = []
            masks = []
            while standing is Standing.OPEN and len(ids) < 200:
                masks.append(state.mask().bits())
                ids.append(draw.choice(sorted(allowed(state))))
                if ids[-1] == EOS:
                    break
                standing = state.advance(ids[-1])
            kept = ids[: min(cut, len(ids) - 1)]
            again, other = await grammars.begin(constraint, [1], [kept, ids[:-1]], may_end=True)
            assert again.mask().bits() == masks[len(kept)]
            assert other.mask().bits() == masks[-1]
            # Masks ahead of ids that come, and of one that doesn't; states that are walked to by way of them.
            (state,) = await grammars.begin(constraint, [1], [()], may_end=True)
            done = 0
            while done < len(ids) - 1:
                count = draw.randint(0, 5)
                drafts = ids[done : len(ids) - 1][:count]
                wrong = [draw.randrange(256)] * draw.randint(0, 1)
                behind = [mask.bits() for mask in state.masks_behind([*drafts, *wrong])]
                assert behind[: len(drafts)] == masks[done + 1 :][: len(drafts)]
                for token in ids[done : len(ids) - 1][: draw.randint(1, count + 2)]:
                    assert state.mask().bits() == masks[done]
                    assert state.advance(token) is Standing.OPEN
                    done += 1
            assert state.mask().bits() == masks[-1]
            if standing is Standing.COMPLETE:
                words = dict(zip(range(256, 261), (b"th", b"the", b"tr", b"tru", b"true"), strict=True))
                data = b"".join(words.get(token) or bytes([token]) for token in ids)
                jsonschema.validate(json.loads(data), SCHEMA)
        finally:
            await grammars.close()

    asyncio.run(walk())


def nested(depth: int) -> str:
    return '{"type": "object", "properties": {"a": ' * depth + "{}" + "}}" * depth


HOSTILE = {
    "nested 400 deep": ({"json_schema": nested(400)}, "deep"),
    "nested 10,000 deep": ({"json_schema": '{"items": ' * 6000 + "{}" + "}" * 6000}, "deep"),
    "refers to itself": ({"json_schema": '{"$ref": "#"}'}, "no output"),
    "too many meetings": (
        {"json_schema": json.dumps({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"type": "string"}}}
                                                         for j in range(4)]} for i in range(12)]})},
        "too large",
    ),
    "overflows the stack": (
        {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(5000)) + 'r5000: "a"'},
        "deep",
    ),
    "parentheses": ({"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000}, "nested"),
    "doubles": (
        {"grammar": "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "a"'},
        "too big",
    ),
    "no way in": ({"grammar": "start: start"}, "no output"),
    "looks ahead": ({"regex": "(?=a)b"}, "look"),
    "malformed": ({"regex": "(a"}, "unclosed"),
    "no JSON": ({"json_schema": "{"}, "no JSON"),
    "no schema": ({"json_schema": "[]"}, "no JSON schema"),
    "elsewhere": ({"json_schema": '{"$ref": "https://example.com/x"}'}, "example.com"),
    "can't be followed": ({"json_schema": '{"not": {"type": "string"}}'}, "not"),
    "too long": ({"regex": "a" * 200_000}, "131072"),
}  # fmt: skip


async def test_hostile_ones_are_refused_and_others_go_on(grammars: Grammars) -> None:
    for name, (kind, why) in HOSTILE.items():
        with pytest.raises(ConstraintRefused) as caught:
            await begin(grammars, **kind)
        assert caught.value.field == f"constraint.{next(iter(kind))}", name
        assert why in caught.value.detail, (name, caught.value.detail)
        assert len(caught.value.detail) < 400
        assert (await begin(grammars, regex="a")).advance(*text_ids("a")) is Standing.COMPLETE


async def test_one_that_takes_for_ever_is_killed(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.constraints.helper.CHECK_SECONDS", 0.5)
    patterns = [f".*{chr(97 + i)}.{{{200 + i}}}" for i in range(20)]
    schema = json.dumps({"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]})
    other = asyncio.create_task(begin(grammars, regex="b"))
    with pytest.raises(ConstraintRefused, match="seconds"):
        await begin(grammars, json_schema=schema)
    await other
    with pytest.raises(ConstraintRefused, match="seconds"):  # remembered: not tried again
        await begin(grammars, json_schema=schema)


@pytest.mark.parametrize(
    "kind",
    [
        {"regex": "((a{1,100}){1,100}){1,100}"},
        {"grammar": 'start: s\ns: s s | "a" | ""'},
        {"grammar": 'start: s{1,1000000}\ns: t{1,100000}\nt: "a"{1,100000}'},
    ],
)
async def test_one_that_runs_away_is_stopped(grammars: Grammars, kind: dict[str, Any]) -> None:
    state = await begin(grammars, **kind)
    (a,) = text_ids("a")
    for _ in range(2000):
        if not state.mask().bits():
            assert state.undrawn() is Standing.FAILED
            return
        if state.advance(a) is Standing.FAILED:
            return
    raise AssertionError("it was not stopped")


async def test_left_recursion_is_no_harm(grammars: Grammars) -> None:
    state = await begin(grammars, grammar='start: s\ns: s "a" | "b"')
    for char in text_ids("b" + "a" * 500):
        assert char in allowed(state)
        assert state.advance(char) is Standing.OPEN


async def test_what_was_compiled_is_kept(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    check = grammars._helper.check

    async def counted(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request["text"])
        return await check(request)

    monkeypatch.setattr(grammars._helper, "check", counted)
    monkeypatch.setattr(module, "CACHE_ENTRIES", 2)
    await asyncio.gather(*(begin(grammars, regex=text) for text in "aaab"))
    await begin(grammars, regex="a", free_thinking=True)
    assert sorted(asked) == ["a", "b"]
    for text in "ca":
        await begin(grammars, regex=text)
    assert sorted(asked) == ["a", "b", "c"]
    await begin(grammars, regex="b")
    assert sorted(asked) == ["a", "b", "b", "c"]


async def test_so_many_at_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 3)
    made = await asyncio.gather(*(begin(grammars, regex=str(i)) for i in range(5)), return_exceptions=True)
    assert [isinstance(one, TooManyPending) for one in made] == [False] * 3 + [True] * 2
    await begin(grammars, regex="later")


async def test_a_model_that_cant_think() -> None:
    from tests.helpers.tokenizers import added_token, tiny_tokenizer_json

    grammars = Grammars(json.dumps(tiny_tokenizer_json([added_token(256, "<|im_end|>")])), 257, [256])
    try:
        with pytest.raises(ConstraintRefused, match="<think>"):
            await begin(grammars, regex="a", free_thinking=True)
    finally:
        await grammars.close()


def test_a_folder_without_a_tokenizer(tmp_path: Any) -> None:
    assert Grammars.of(tmp_path, 257, [256]) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert Grammars.of(tmp_path, 257, [256]) is None
