"""One model folder's tokenizer: text to ids, ids to text, and the facts that callers ask about.

Invariant: what an encoding depends on is the text and two switches, nothing else. Truncation, padding and BPE dropout,
all of which a tokenizer.json can switch on, are off.

Two Rust tokenizers are built from one file. The second has no added tokens, so no text can make it produce one. The
library's own `encode_special_tokens` switch covers only tokens marked special, and `<think>` in Qwen3 is not.

Format: https://huggingface.co/docs/tokenizers (tokenizer.json, tokenizer_config.json).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tokenizer_svc.errors import TextError, TokenIdError, TokenizerLoadError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """One entry of tokenizer.json's `added_tokens`: text that the tokenizer cuts out before anything else."""

    id: int
    content: str
    special: bool
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool


class Codec:
    """Encode and decode with one tokenizer. Thread-safe: nothing changes after `load`.

    Attributes:
        vocab_size: ids are in [0, vocab_size); the larger of what tokenizer.json holds and config.json's `vocab_size`,
            for models pad their vocabulary and can generate ids that have no token (they decode to nothing).
        added_tokens: in the order of their ids.
        special_ids: ids that `skip_special_tokens` leaves out.
        named_tokens: tokenizer_config.json's bos_token, eos_token and so on, those that are set: name to content.
        eos_ids: the id of tokenizer_config.json's eos_token, or empty.
        digest: SHA-256 of tokenizer.json, 64 hex digits.
        has_normalizer: whether text is normalized (Qwen: NFC) before it is split.
    """

    def __init__(self, raw: bytes, config: Mapping[str, Any], model_vocab_size: int = 0) -> None:
        """Prefer `load`. `raw` is the content of tokenizer.json, `config` that of tokenizer_config.json.

        Raises:
            TokenizerLoadError: the content is not a tokenizer of a supported kind.
        """
        data = _parse_object(raw, "tokenizer.json")
        _require_byte_level_bpe(data)
        added = _read_added_tokens(data)
        _switch_off_random_and_cutting(data)
        self._full = _build(data)
        for token in added:
            # The library numbers added tokens itself, whatever ids the file gives them.
            if self._full.token_to_id(token.content) != token.id:
                raise TokenizerLoadError(f"tokenizer.json: added token {token.id} would get another id")
        self._plain = _build(_without_added_tokens(data, {token.id for token in added}))
        self.added_tokens = added
        self.added_token_ids: dict[str, int] = {token.content: token.id for token in added}
        self.special_ids = frozenset(token.id for token in added if token.special)
        self.named_tokens = _named_tokens(config)
        eos = self._full.token_to_id(self.named_tokens["eos_token"]) if "eos_token" in self.named_tokens else None
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.digest = hashlib.sha256(raw).hexdigest()
        self.has_normalizer = data.get("normalizer") is not None
        self._tokens = _tokens_by_id(data, added)
        self.vocab_size = max(len(self._tokens), model_vocab_size)

    @classmethod
    def load(cls, folder: str | Path) -> Codec:
        """Read tokenizer.json, and tokenizer_config.json and config.json where they exist, from a model folder.

        Raises:
            TokenizerLoadError: tokenizer.json is missing; any of the files is corrupt; the tokenizer is not a
                byte-level BPE, as all Qwen models use.
        """
        path = Path(folder)
        try:
            raw = (path / "tokenizer.json").read_bytes()
        except OSError as error:
            raise TokenizerLoadError(f"cannot read tokenizer.json: {error.strerror}") from error
        config = read_json_object(path / "tokenizer_config.json")
        size = read_json_object(path / "config.json").get("vocab_size", 0)
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise TokenizerLoadError("config.json: vocab_size is not a whole number")
        return cls(raw, config, size)

    def tokens(self) -> Sequence[str | None]:
        """The vocabulary by id, in the byte-level alphabet; None where an id has no token."""
        return self._tokens

    def encode(self, text: str, *, add_special_tokens: bool = False, special_tokens_as_text: bool = False) -> list[int]:
        """Ids of one text.

        Args:
            text: any Unicode text, NUL included.
            add_special_tokens: let the tokenizer's post-processor add what it adds (Qwen: nothing; Llama: BOS).
            special_tokens_as_text: no added token, special or not, comes out of the text: `<|im_start|>` and
                `<think>` are encoded as the characters they are.

        Raises:
            TextError: the text holds a lone surrogate.
        """
        return self.encode_batch(
            [text], add_special_tokens=add_special_tokens, special_tokens_as_text=special_tokens_as_text
        )[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = False, special_tokens_as_text: bool = False
    ) -> list[list[int]]:
        """`encode` for many texts; those are shared out over the cores by the Rust library."""
        tokenizer = self._plain if special_tokens_as_text else self._full
        try:
            encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise TextError("a text cannot be encoded as UTF-8") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids: bytes joined, then decoded as UTF-8 with U+FFFD for what is not UTF-8.

        Raises:
            TokenIdError: an id is outside [0, vocab_size); names the first.
        """
        self.check_ids(ids)
        return self._full.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def decode_batch(self, batch: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """`decode` for many sequences."""
        for ids in batch:
            self.check_ids(ids)
        return self._full.decode_batch([list(ids) for ids in batch], skip_special_tokens=skip_special_tokens)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise TokenIdError for the first id outside [0, vocab_size)."""
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            index = next(i for i, value in enumerate(ids) if not 0 <= value < self.vocab_size)
            raise TokenIdError(index, ids[index], self.vocab_size)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no such file; TokenizerLoadError for anything else."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TokenizerLoadError(f"cannot read {path.name}: {error.strerror}") from error
    return _parse_object(raw, path.name)


def _parse_object(raw: bytes, name: str) -> dict[str, Any]:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TokenizerLoadError(f"{name} is not valid JSON") from error
    if not isinstance(data, dict):
        raise TokenizerLoadError(f"{name} is not a JSON object")
    return data


def _build(data: dict[str, Any]) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the Rust library raises plain Exception for whatever it cannot read
        raise TokenizerLoadError(f"tokenizer.json cannot be read as a tokenizer: {error}") from error


def _require_byte_level_bpe(data: dict[str, Any]) -> None:
    model = data.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE" or not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise TokenizerLoadError(f"tokenizer.json: model type {kind!r} is not supported, only BPE is")
    decoder = data.get("decoder")
    while isinstance(decoder, dict) and decoder.get("type") == "Sequence" and len(decoder.get("decoders") or ()) == 1:
        decoder = decoder["decoders"][0]
    found = decoder.get("type") if isinstance(decoder, dict) else None
    if found != "ByteLevel":
        raise TokenizerLoadError(f"tokenizer.json: decoder {found!r} is not supported, only ByteLevel is")


def _switch_off_random_and_cutting(data: dict[str, Any]) -> None:
    data["truncation"] = None
    data["padding"] = None
    if data["model"].get("dropout") is not None:
        data["model"]["dropout"] = None


def _read_added_tokens(data: dict[str, Any]) -> tuple[AddedToken, ...]:
    try:
        added = [
            AddedToken(
                id=int(entry["id"]),
                content=str(entry["content"]),
                special=bool(entry["special"]),
                single_word=bool(entry["single_word"]),
                lstrip=bool(entry["lstrip"]),
                rstrip=bool(entry["rstrip"]),
                normalized=bool(entry["normalized"]),
            )
            for entry in data.get("added_tokens") or ()
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerLoadError("tokenizer.json: added_tokens has an entry that is not an added token") from error
    return tuple(sorted(added, key=lambda token: token.id))


def _without_added_tokens(data: dict[str, Any], added_ids: set[int]) -> dict[str, Any]:
    """tokenizer.json whose model cannot produce any of `added_ids`.

    An added token may also be an entry of the model's vocabulary (SmolLM2's are), where merges or `ignore_merges`
    could reach it from plain text. Such entries go, with every merge that makes or uses them.
    """
    model = dict(data["model"])
    removed = {token for token, index in model["vocab"].items() if index in added_ids}
    # Without its single byte a text would lose characters, silently.
    if any(len(token) == 1 for token in removed):
        raise TokenizerLoadError("tokenizer.json: an added token is also a single byte of the vocabulary")
    if removed:
        model["vocab"] = {token: index for token, index in model["vocab"].items() if token not in removed}
        pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        model["merges"] = [
            list(pair) for pair in pairs if not removed.intersection(pair) and "".join(pair) not in removed
        ]
        if model.get("unk_token") in removed:
            model["unk_token"] = None
    return {**data, "added_tokens": [], "model": model}


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            named[name] = content
    return named


def _tokens_by_id(data: dict[str, Any], added: Sequence[AddedToken]) -> list[str | None]:
    vocab: dict[str, int] = data["model"]["vocab"]
    size = 1 + max([*vocab.values(), *(token.id for token in added)], default=-1)
    tokens: list[str | None] = [None] * size
    for token, index in vocab.items():
        tokens[index] = token
    for entry in added:  # the library, too, asks the added tokens first
        tokens[entry.id] = entry.content
    return tokens
