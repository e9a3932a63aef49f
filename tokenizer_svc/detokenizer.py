"""Ids to text, piece by piece, for many sequences at once.

Invariant: the text released after k ids is a function of those ids and the stop options, never of how the ids were
split into pushes. A sequence can therefore be reopened anywhere from its ids alone.

Qwen tokenizers decode byte by byte: an id stands for some bytes, the text is all bytes decoded as UTF-8 with U+FFFD
for what is not UTF-8. So the only state between ids is an unfinished character of at most three bytes, and the text
that may still turn out to be part of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizer_svc.codec import Codec
from tokenizer_svc.errors import TokenizerError
from tokenizer_svc.stop_strings import StopMatcher, StopOptions


def byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that byte-level vocabularies write bytes in, each with its byte.

    Source: `bytes_to_unicode` in openai/gpt-2, src/encoder.py.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Detokenizer:
    """The bytes of every id, built once for a tokenizer and shared by all sequences."""

    def __init__(self, codec: Codec, *, skip_special_tokens: bool = True) -> None:
        """Special tokens have no text when skipped; added tokens that are not special (`<think>`) always have."""
        alphabet = byte_alphabet()
        special = {token.content for token in codec.added_tokens if token.special} if skip_special_tokens else set()
        self._bytes = [b"" if token is None or token in special else _token_bytes(token, alphabet)
                       for token in codec.tokens()]  # fmt: skip

    def open(self, start_ids: Sequence[int] = (), stop: StopOptions | None = None) -> DetokenizerState:
        """A new sequence, or one that goes on after `start_ids`."""
        return DetokenizerState(self, start_ids, stop)

    def bytes_of(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of each id; empty for ids without a token, which a model with a padded vocabulary can generate.

        Raises:
            TokenizerError: an id is negative.
        """
        table, size = self._bytes, len(self._bytes)
        found = []
        for value in ids:
            if value < 0:
                raise TokenizerError(f"token id {value} is negative")
            found.append(table[value] if value < size else b"")
        return found


def _token_bytes(token: str, alphabet: dict[str, int]) -> bytes:
    # The Rust decoder takes a token with any character outside the alphabet as the text it is.
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:
        return token.encode()


@dataclass(frozen=True)
class Piece:
    """What a push released.

    Attributes:
        text: new text, valid UTF-8; concatenated, the pieces and the flush are the sequence's text.
        ids_consumed: ids of the sequence so far, start ids included; at a match, up to and including the one that
            completed it, whatever else was pushed.
        match: the stop string that ended the sequence, None while it goes on.
    """

    text: str
    ids_consumed: int
    match: str | None


class DetokenizerState:
    """One sequence.

    Text is the UTF-8 of the ids' bytes. It is released as soon as it can be neither an unfinished character nor the
    beginning of a stop string; `flush` releases what is still held at the end.

    A stop string matches where all of its text is in the generated text; special tokens contribute none. The match
    with the earliest end ends the sequence; of several that end at one character, the one that starts first. The text
    is cut before it, or after it with `include_stop`; later text is dropped, later ids are not consumed.

    An occurrence belongs to the id that brings its last byte (for U+FFFD in place of bad bytes: the id that shows them
    to be bad). If that is the k-th id and k < min_tokens, the occurrence is ignored for good: its text passes as any
    other. U+FFFD that `flush` makes of a character that was never finished completes no match.

    Memory: at most three bytes and MAX_STOP_CHARS characters, besides the automaton of the stop strings.
    """

    def __init__(self, table: Detokenizer, start_ids: Sequence[int] = (), stop: StopOptions | None = None) -> None:
        """Replay `start_ids` silently: what they had released counts in `text_bytes` and is not released again. A stop
        string within them ends the sequence at once: `match` is set, and pushes and the flush bring nothing."""
        self._table = table
        self._stop = stop or StopOptions()
        self._matcher = StopMatcher(self._stop.strings) if self._stop.strings else None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._flushed = False
        self.ids_consumed = 0
        self.text_bytes = 0  # released so far, in UTF-8
        self.match: str | None = None
        self.push(start_ids)

    def push(self, ids: Sequence[int]) -> Piece:
        """Go on with `ids`. After a match nothing more is consumed.

        Raises:
            TokenizerError: an id is negative (nothing is consumed then), or the sequence was flushed.
        """
        if self._flushed:
            raise TokenizerError("the sequence was flushed and takes no more ids")
        pieces = self._table.bytes_of(ids)
        if self.match is not None:
            return Piece("", self.ids_consumed, self.match)
        text = self._push_plain(pieces) if self._matcher is None else self._push_matching(pieces, self._matcher)
        self.text_bytes += len(text.encode())
        return Piece(text, self.ids_consumed, self.match)

    def _push_plain(self, pieces: list[bytes]) -> str:
        self.ids_consumed += len(pieces)
        return self._decoder.decode(b"".join(pieces))

    def _push_matching(self, pieces: list[bytes], matcher: StopMatcher) -> str:
        released: list[str] = []
        # Id by id, so that a match is known to belong to one id however many came at once.
        for piece in pieces:
            self.ids_consumed += 1
            new = self._decoder.decode(piece)
            if not new:
                continue
            found = matcher.feed(new, ignore=self.ids_consumed < self._stop.min_tokens)
            text = self._held + new
            if found is not None:
                self.match = found.stop
                end = len(self._held) + found.end
                released.append(text[: end if self._stop.include_stop else end - len(found.stop)])
                self._held = ""
                break
            keep = len(text) - matcher.hold
            released.append(text[:keep])
            self._held = text[keep:]
        return "".join(released)

    def flush(self) -> str:
        """The end: what was held, U+FFFD for a character never finished. Empty after a match or an earlier flush."""
        if self._flushed or self.match is not None:
            self._flushed = True
            return ""
        self._flushed = True
        text = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        self.text_bytes += len(text.encode())
        return text
