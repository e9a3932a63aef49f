"""Streamed text equals one-shot decoding, and depends on the ids alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.tokenizers import added_token, tiny_tokenizer_json
from tokenizer_svc.codec import Codec
from tokenizer_svc.detokenizer import Detokenizer, DetokenizerState
from tokenizer_svc.errors import StopOptionsError, TokenizerError
from tokenizer_svc.stop_strings import MAX_STOP_CHARS, MAX_STOP_STRINGS, StopOptions

# 256 bytes, "th", "the"; "éé" is written in the byte alphabet, so it is two bytes, "你" is not; no tokens from 263 on.
ADDED = [added_token(258, "<eos>"), added_token(259, "<t>", special=False), added_token(260, "éé", special=False),
         added_token(261, "你 ", special=False), added_token(262, "你", special=True)]  # fmt: skip
CODEC = Codec(json.dumps(tiny_tokenizer_json(ADDED, ["t h", "th e"])).encode(), {}, 270)
TABLE = Detokenizer(CODEC)
# Bytes of multi-byte characters, valid and not, more often than chance would have them.
HARD = [*"👩‍👩‍👧你é€\x00a".encode(), 0xFF, 0xC0, 0xED, 0xA0, 0x80, 0xF4, 0x90, 0xE2, 0x82]
IDS = st.lists(st.sampled_from(HARD) | st.integers(0, 269), max_size=40)
TEXTS = [
    "family 👩‍👩‍👧‍👦 flags 🇺🇳🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "漢字かな交じり文 한국어",
    "a\x00b\x00",
    "naïve e\u0301 \ufffd \u200d",
    "العربية हिन्दी",
]


def all_text(state: DetokenizerState, ids: list[int]) -> str:
    return "".join([state.push([i]).text for i in ids]) + state.flush()


@settings(max_examples=400, deadline=None)
@given(IDS, st.booleans())
def test_streamed_equals_one_shot(ids: list[int], skip: bool) -> None:
    table = TABLE if skip else Detokenizer(CODEC, skip_special_tokens=False)
    text = all_text(table.open(), ids)
    assert text == CODEC.decode(ids, skip_special_tokens=skip)
    once = table.open()
    assert once.push(ids).text + once.flush() == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 151668) | st.integers(151640, 151668), max_size=30), st.booleans())
def test_streamed_equals_one_shot_on_the_real_vocabulary(
    qwen3_table: Detokenizer, qwen3: Codec, ids: list[int], keep: bool
) -> None:
    table = Detokenizer(qwen3, skip_special_tokens=False) if keep and 151644 in ids else qwen3_table
    expected = qwen3.decode(ids, skip_special_tokens=table is qwen3_table)
    assert all_text(table.open(), ids) == expected


@pytest.fixture(scope="session")
def qwen3_table(qwen3: Codec) -> Detokenizer:
    return Detokenizer(qwen3)


@pytest.mark.parametrize("text", TEXTS)
def test_real_text(qwen3: Codec, qwen3_table: Detokenizer, text: str) -> None:
    ids = qwen3.encode(text)
    state = qwen3_table.open()
    pieces = [state.push([i]).text for i in ids]
    for piece in pieces:
        piece.encode()  # valid UTF-8 each
    assert "".join(pieces) + state.flush() == qwen3.decode(ids)
    assert state.text_bytes == len(qwen3.decode(ids).encode())


def test_every_token_alone(qwen3: Codec, qwen3_table: Detokenizer) -> None:
    batch = [[i] for i in range(qwen3.vocab_size)]
    for ids, expected in zip(batch, qwen3.decode_batch(batch), strict=True):
        assert all_text(qwen3_table.open(), ids) == expected


def test_unfinished_character_is_held() -> None:
    state = TABLE.open()
    assert [state.push([byte]).text for byte in "é👩".encode()] == ["", "é", "", "", "", "👩"]
    assert state.push([0xE4, 0xBD]).text == ""
    assert state.flush() == "\ufffd"
    assert state.flush() == ""
    with pytest.raises(TokenizerError):
        state.push([1])


def test_negative_id_changes_nothing() -> None:
    state = TABLE.open()
    with pytest.raises(TokenizerError):
        state.push([97, -1])
    assert (state.push([98]).text, state.ids_consumed) == ("b", 1)


STOPS = st.lists(st.text("abé\ufffd", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)
STOP_IDS = st.lists(st.sampled_from([97, 98, 97, 98, 0xC3, 0xA9, 0xFF, 258, 265, 259, 116]), max_size=24)
STOP_OPTIONS = st.builds(StopOptions, STOPS, st.booleans(), st.integers(0, 8))


def oracle(ids: list[int], options: StopOptions) -> tuple[str, str | None, int]:
    """The whole text, the match and the ids consumed: by looking at every end of every prefix of the ids."""
    # texts[k]: what k ids say for certain, so without an unfinished character at the end.
    texts = []
    for k in range(len(ids) + 1):
        text = b"".join(TABLE.bytes_of(ids[:k]))
        certain = text[:-1] if text.endswith(b"\xc3") else text  # the only first byte in STOP_IDS
        texts.append(certain.decode("utf-8", "replace"))
    for k in range(1, len(texts)):
        if k < options.min_tokens:
            continue
        for end in range(len(texts[k - 1]) + 1, len(texts[k]) + 1):
            found = [stop for stop in options.strings if texts[k][:end].endswith(stop)]
            if found:
                longest = max(found, key=len)
                return texts[k][: end if options.include_stop else end - len(longest)], longest, k
    return b"".join(TABLE.bytes_of(ids)).decode("utf-8", "replace"), None, len(ids)


@settings(max_examples=500, deadline=None)
@given(STOP_IDS, STOP_OPTIONS, st.lists(st.integers(1, 6), max_size=24))
def test_stop_strings_against_the_oracle(ids: list[int], options: StopOptions, splits: list[int]) -> None:
    text, match, consumed = oracle(ids, options)
    singly = TABLE.open(stop=options)
    released = [""]
    for index in ids:
        released.append(released[-1] + singly.push([index]).text)
    assert (singly.match, singly.ids_consumed) == (match, consumed)
    assert released[-1] + singly.flush() == text

    # However the ids are split, the text after k of them is the same.
    split, at, seen = TABLE.open(stop=options), 0, ""
    for size in [*splits, len(ids)]:
        piece = split.push(ids[at : at + size])
        seen += piece.text
        at = min(at + size, len(ids))
        assert seen == released[at]
        assert split.text_bytes == len(seen.encode())
        assert piece.ids_consumed == min(at, consumed)
    assert seen + split.flush() == text
    assert split.match == match

    # Reopened after k ids it goes on where it was.
    for k in range(len(ids) + 1):
        again = TABLE.open(ids[:k], options)
        assert again.text_bytes == len(released[k].encode())
        assert released[k] + again.push(ids[k:]).text + again.flush() == text
        assert (again.match, again.ids_consumed) == (match, consumed)


@given(STOP_IDS, STOP_OPTIONS)
def test_text_is_held_only_while_it_may_be_a_stop_string(ids: list[int], options: StopOptions) -> None:
    state = TABLE.open(stop=options)
    for k in range(len(ids)):
        state.push([ids[k]])
        if state.match is None and state._held:
            assert any(stop.startswith(state._held) and stop != state._held for stop in options.strings)


def push_text(text: str, *strings: str, include_stop: bool = False, min_tokens: int = 0) -> tuple[str, str | None, int]:
    state = TABLE.open(stop=StopOptions(strings, include_stop, min_tokens))
    piece = state.push(list(text.encode()))
    return piece.text + state.flush(), piece.match, piece.ids_consumed


def test_stop_string_rules() -> None:
    assert push_text("one two three", "two") == ("one ", "two", 7)
    assert push_text("one two three", "two", include_stop=True) == ("one two", "two", 7)
    assert push_text("abcd", "bcd", "bc") == ("a", "bc", 3)  # the earliest end
    assert push_text("abcd", "c", "abc") == ("", "abc", 3)  # of those, the earliest start
    assert push_text("aaab", "aab") == ("a", "aab", 4)
    assert push_text("no match here", "absent") == ("no match here", None, 13)
    assert push_text("ends in a pref", "prefix") == ("ends in a pref", None, 14)
    assert push_text("stop stop", "stop", min_tokens=4) == ("", "stop", 4)
    assert push_text("stop stop", "stop", min_tokens=5) == ("stop ", "stop", 9)
    assert push_text("xyz👩‍👩!", "👩‍👩") == ("xyz", "👩‍👩", 14)


def test_special_tokens_contribute_no_text_to_a_stop_string() -> None:
    state = TABLE.open(stop=StopOptions(("<eos>", "ab")))
    assert state.push([258, 97]).text == ""
    assert state.push([258]).match is None
    assert state.push([98]).match == "ab"
    # An added token that is not special is text.
    assert TABLE.open(stop=StopOptions(("<t>",))).push([97, 259]).match == "<t>"


def test_stop_string_inside_one_token() -> None:
    state = TABLE.open(stop=StopOptions(("h",)))
    piece = state.push([257, 97])  # "the"
    assert (piece.text, piece.match, piece.ids_consumed) == ("t", "h", 1)
    assert state.push([97]).text == ""
    assert state.flush() == ""


def test_stop_options_have_limits() -> None:
    for options in ({"strings": ("",)}, {"strings": ("x" * (MAX_STOP_CHARS + 1),)}, {"min_tokens": -1},
                    {"strings": ("x",) * (MAX_STOP_STRINGS + 1)}):  # fmt: skip
        with pytest.raises(StopOptionsError):
            StopOptions(**options)


def test_memory_of_a_long_sequence_is_bounded() -> None:
    state = TABLE.open(stop=StopOptions(("a" * 100,)))
    for _ in range(200):
        state.push([97] * 99 + [98])
    assert len(state._held) < 100
    assert state.text_bytes == 200 * 100
