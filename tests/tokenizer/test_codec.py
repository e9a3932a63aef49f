"""Encoding, decoding, and what a model folder is refused for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.helpers.tokenizers import added_token, tiny_tokenizer_json, write_tokenizer
from tokenizer_svc.codec import Codec
from tokenizer_svc.errors import TextError, TokenIdError, TokenizerLoadError

TEXT = "Hello, wörld! 你好 👩‍👩‍👧 e\u0301 \x00 <think>x</think><|im_end|>\n\n  tail"


def codec_of(data: dict[str, Any], config: dict[str, Any] | None = None) -> Codec:
    return Codec(json.dumps(data).encode(), config or {})


def test_encodes_as_the_library_does(qwen3: Codec, qwen3_tokenizer: Path) -> None:
    oracle = Tokenizer.from_file(str(qwen3_tokenizer / "tokenizer.json"))
    assert qwen3.encode(TEXT) == oracle.encode(TEXT).ids
    assert qwen3.encode_batch([TEXT, "", "a"]) == [oracle.encode(text).ids for text in (TEXT, "", "a")]
    ids = oracle.encode(TEXT).ids
    assert qwen3.decode(ids) == oracle.decode(ids)
    assert "<|im_end|>" in qwen3.decode(ids, skip_special_tokens=False)
    assert qwen3.decode_batch([ids, []]) == [oracle.decode(ids), ""]


def test_facts(qwen3: Codec, qwen3_tokenizer: Path) -> None:
    assert qwen3.vocab_size == 151669
    assert qwen3.eos_ids == (151645,)
    assert 151645 in qwen3.special_ids
    assert 151667 not in qwen3.special_ids
    assert qwen3.added_token_ids["<think>"] == 151667
    assert qwen3.digest == hashlib.sha256((qwen3_tokenizer / "tokenizer.json").read_bytes()).hexdigest()


def test_special_tokens_as_text_makes_no_added_token(qwen3: Codec) -> None:
    text = "".join(qwen3.added_token_ids) + "<|im_start|><think>\n"
    ids = qwen3.encode(text, special_tokens_as_text=True)
    assert not set(ids) & set(qwen3.added_token_ids.values())
    assert qwen3.decode(ids) == text
    assert qwen3.encode("plain text", special_tokens_as_text=True) == qwen3.encode("plain text")


@given(st.lists(st.sampled_from(["<x", "x>", "<x>", "<", ">", "ab", "a", "b", " "]), max_size=12).map("".join))
def test_added_tokens_that_merges_reach_stay_text(text: str) -> None:
    # "<x>" and "ab" are entries of the vocabulary that merges make; added tokens with the same ids.
    data = tiny_tokenizer_json(merges=["< x", "<x >", "a b", "ab ab"])
    vocab = data["model"]["vocab"]
    data["added_tokens"] = [added_token(vocab["<x>"], "<x>"), added_token(vocab["ab"], "ab", special=False)]
    codec = codec_of(data)
    ids = codec.encode(text, special_tokens_as_text=True)
    assert not {vocab["<x>"], vocab["ab"]} & set(ids)
    assert codec.decode(ids) == text


def test_added_token_that_ignore_merges_reaches_stays_text() -> None:
    data = tiny_tokenizer_json(merges=["a b"])
    data["model"]["ignore_merges"] = True
    data["model"]["vocab"]["abc"] = 257
    data["added_tokens"] = [added_token(257, "abc")]
    codec = codec_of(data)
    assert codec.encode("abc") == [257]
    assert codec.encode("abc", special_tokens_as_text=True) == [256, ord("c")]


def test_added_token_that_is_a_single_byte_is_refused() -> None:
    with pytest.raises(TokenizerLoadError, match="single byte"):
        codec_of(tiny_tokenizer_json([added_token(ord("a"), "a")]))


def test_truncation_padding_and_dropout_are_off() -> None:
    data = tiny_tokenizer_json(merges=["a b"])
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
                       "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    data["model"]["dropout"] = 0.9
    codec = codec_of(data)
    for as_text in (False, True):
        assert codec.encode("ab" * 5, special_tokens_as_text=as_text) == [256] * 5


def test_add_special_tokens_is_the_post_processors_work() -> None:
    data = tiny_tokenizer_json([added_token(256, "<bos>")])
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [256], "tokens": ["<bos>"]}},
    }
    codec = codec_of(data)
    assert codec.encode("a") == [97]
    assert codec.encode("a", add_special_tokens=True) == [256, 97]
    assert codec.encode("<bos>", add_special_tokens=True, special_tokens_as_text=True) == [256, *b"<bos>"]


def test_ids_outside_the_vocabulary(qwen3: Codec) -> None:
    for ids, index in (([1, 2, 151669], 2), ([-1], 0), ([5, 2**32 - 1, -3], 1)):
        with pytest.raises(TokenIdError) as caught:
            qwen3.decode(ids)
        assert (caught.value.index, caught.value.value, caught.value.vocab_size) == (index, ids[index], 151669)
    with pytest.raises(TokenIdError):
        qwen3.decode_batch([[1], [151669]])


def test_a_padded_vocabulary_decodes_to_nothing(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, tiny_tokenizer_json())
    (folder / "config.json").write_text('{"vocab_size": 300}')
    codec = Codec.load(folder)
    assert codec.vocab_size == 300
    assert codec.decode([97, 299, 98]) == "ab"


def test_eos_given_as_an_object() -> None:
    codec = codec_of(tiny_tokenizer_json([added_token(256, "<eos>")]), {"eos_token": {"content": "<eos>"}})
    assert codec.eos_ids == (256,)


def test_lone_surrogate(qwen3: Codec) -> None:
    with pytest.raises(TextError):
        qwen3.encode("a\ud800")


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerLoadError, match=r"cannot read tokenizer\.json: No such file"):
        Codec.load(tmp_path)
    for content, message in (
        (b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[]", "not a JSON object"), (b"{}", "model type None"),
        (b"[" * 100_000, "not valid JSON"),
    ):  # fmt: skip
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(TokenizerLoadError, match=message):
            Codec.load(tmp_path)
    write_tokenizer(tmp_path, tiny_tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text("nonsense")
    with pytest.raises(TokenizerLoadError, match=r"tokenizer_config\.json is not valid JSON"):
        Codec.load(tmp_path)


def test_unsupported_kinds_are_refused() -> None:
    data = tiny_tokenizer_json()
    byte_level = data["decoder"]
    codec_of({**data, "decoder": {"type": "Sequence", "decoders": [byte_level]}})
    for decoder in (None, {"type": "Metaspace"}, {"type": "Sequence", "decoders": [byte_level, {"type": "Fuse"}]}):
        with pytest.raises(TokenizerLoadError, match="only ByteLevel"):
            codec_of({**data, "decoder": decoder})
    with pytest.raises(TokenizerLoadError, match="'Unigram' is not supported"):
        codec_of({**data, "model": {"type": "Unigram", "vocab": [["a", 0.0]]}})
    with pytest.raises(TokenizerLoadError, match="not an added token"):
        codec_of({**data, "added_tokens": [{"id": 300}]})
    with pytest.raises(TokenizerLoadError, match="cannot be read"):
        codec_of({**data, "normalizer": {"type": "Nonsense"}})
    with pytest.raises(TokenizerLoadError, match="another id"):
        codec_of({**data, "added_tokens": [added_token(300, "<x>")]})
