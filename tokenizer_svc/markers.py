"""Added tokens come from the template or from assistant turns, never from other people's text.

A chat template joins trusted and untrusted strings into one, and the tokenizer then cuts added tokens (`<|im_start|>`,
`<think>`) out of it wherever they stand. To tell whose they are, every place in an untrusted string where an added
token could come to stand is broken by a sentinel: a private-use character that occurs nowhere in the chat or the
template. The rendered text is split at the unbroken added tokens, the sentinels are removed, and what lies between is
encoded by a tokenizer that has no added tokens. Text in which no marker is written is left as it is, so that the
template's own string operations and the resulting ids are those of transformers.

Where a token can come to stand (case ignored and outer white space overlooked, for templates change both):

- whole, within the string;
- begun at the string's end and completed by what follows: every such end is broken;
- completed by the string's beginning, after text that ends in the first part of a token. Few templates write such
  text (Qwen3-Coder's `<{{ key }}>` is one), so beginnings are broken only for those first parts, called seams, that
  the template's literals or trusted strings of this chat do end in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizer_svc.codec import Codec
from tokenizer_svc.errors import ChatError, ChatFailure, TokenizerLoadError

_PRIVATE_USE = range(0xE000, 0xF900)

Seams = frozenset[str]
"""What is still missing of a token after each way that a preceding text may end, in lower case."""


@dataclass(frozen=True)
class Segment:
    """A run of rendered text without added tokens (`token_id` None), or one added token."""

    text: str
    token_id: int | None


class MarkerGuard:
    """Breaks and finds the added tokens of one tokenizer."""

    def __init__(self, codec: Codec) -> None:
        """
        Raises:
            TokenizerLoadError: an added token is matched in a way that splitting at its text would not reproduce.
        """
        for token in codec.added_tokens:
            where = f"tokenizer.json: added token {token.id}"
            if token.single_word or token.lstrip or token.rstrip:
                raise TokenizerLoadError(
                    f"{where} sets single_word, lstrip or rstrip: not supported with chat templates"
                )
            if token.normalized and codec.has_normalizer:
                raise TokenizerLoadError(f"{where} is matched in normalized text: not supported with chat templates")
            if len(token.content) < 2:
                raise TokenizerLoadError(f"{where} has fewer than two characters: not supported with chat templates")
        self._ids = codec.added_token_ids
        # The library prefers the leftmost match and of those the longest; an alternation tries its branches in order.
        contents = sorted(self._ids, key=lambda content: (-len(content), content))
        self._split = re.compile("(" + "|".join(map(re.escape, contents)) + ")") if contents else None
        self._tokens = tuple(content.lower() for content in contents)
        self._longest = max(map(len, contents), default=0)
        # First characters apart, so that the regex engine skips from one to the next; the rest is only looked at, so
        # that overlapping occurrences are all found.
        rests: dict[str, list[str]] = {}
        for content in contents:
            rests.setdefault(content[0], []).append(re.escape(content[1:]))
        starts = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()]
        self._start = re.compile("|".join(starts), re.IGNORECASE) if starts else None

    def seams(self, trusted: Iterable[str], also: Seams = frozenset()) -> Seams:
        """The seams that trusted strings leave open, alone or several in a row, added to those of `also`."""
        texts = {text.strip().lower() for text in trusted} - {""}
        found = set(also)
        for text in texts:
            tail = text[-self._longest :]
            for token in self._tokens:
                for size in range(1, min(len(token) - 1, len(tail)) + 1):
                    if tail.endswith(token[:size]):
                        found.add(token[size:])
        # "<", then "tool_", then a user's "call>": what is missing after "<tool_" is a seam too.
        short = [text for text in texts if len(text) < self._longest]
        waiting = list(found)
        while waiting:
            missing = waiting.pop()
            for text in short:
                rest = missing[len(text) :]
                if rest and rest not in found and missing.startswith(text):
                    found.add(rest)
                    waiting.append(rest)
        return frozenset(found)

    def break_text(self, text: str, sentinel: str, seams: Seams = frozenset()) -> str:
        """`text` with sentinels wherever a token could come to stand; unchanged where none could."""
        if self._start is None:
            return text
        body = text.rstrip()
        for start in range(len(body) - 1, max(-1, len(body) - self._longest), -1):
            end = body[start:].lower()
            if any(token.startswith(end) for token in self._tokens):
                text = text[: start + 1] + sentinel + text[start + 1 :]
        text = self._start.sub(rf"\g<0>{sentinel}", text)
        if seams:
            stripped = text.lstrip()
            head = stripped[: self._longest].lower().replace(sentinel, "")
            if head and any(missing.startswith(head) or head.startswith(missing) for missing in seams):
                text = text[: len(text) - len(stripped)] + sentinel + stripped
        return text

    def break_value(self, value: Any, sentinel: str, seams: Seams, names: frozenset[str]) -> Any:
        """`break_text` for every string in a JSON value, keys included.

        Keys in `names`, which the template looks up, are not broken at their beginning: the look-up would fail.
        """
        if isinstance(value, str):
            return self.break_text(value, sentinel, seams)
        if isinstance(value, dict):
            return {
                self.break_text(key, sentinel, frozenset() if key in names else seams): self.break_value(
                    item, sentinel, seams, names
                )
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.break_value(item, sentinel, seams, names) for item in value]
        return value

    def split(self, rendered: str, sentinel: str) -> list[Segment]:
        """Segments of a rendered chat, in order; no segment is empty."""
        # Python's repr and JSON's ASCII form write the sentinel as an escape; neither occurs in the chat itself.
        escape = sentinel_escape(sentinel)
        parts = [rendered] if self._split is None else self._split.split(rendered)
        segments = []
        for index, part in enumerate(parts):
            if index % 2:
                segments.append(Segment(part, self._ids[part]))
            elif text := part.replace(sentinel, "").replace(escape, ""):
                segments.append(Segment(text, None))
        return segments


def sentinel_escape(sentinel: str) -> str:
    r"""The sentinel as an escape sequence: `\ue000`."""
    return f"\\u{ord(sentinel):04x}"


def choose_sentinel(texts: Sequence[str]) -> str:
    """The first private-use character that none of the texts holds, neither itself nor as an escape.

    Raises:
        ChatError: INVALID_CHAT when the texts hold all 6,400 of them.
    """
    present = {char for text in texts for char in set(text) if ord(char) in _PRIVATE_USE}
    escaped = {code for text in texts for code in re.findall(r"u(?=([0-9a-f]{4}))", text)}
    for code in _PRIVATE_USE:
        if chr(code) not in present and f"{code:04x}" not in escaped:
            return chr(code)
    raise ChatError(ChatFailure.INVALID_CHAT, "the chat uses every private-use character", field="messages")


def encode_segments(codec: Codec, segments: Sequence[Segment]) -> list[int]:
    """Ids of a rendered chat: added tokens by their id, all other text by the tokenizer that has none.

    Raises:
        TextError: a segment holds a lone surrogate.
    """
    texts = [segment.text for segment in segments if segment.token_id is None]
    encoded = iter(codec.encode_batch(texts, special_tokens_as_text=True))
    ids: list[int] = []
    for segment in segments:
        ids.extend(next(encoded) if segment.token_id is None else (segment.token_id,))
    return ids
