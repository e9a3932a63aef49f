"""Grammars over a vocabulary of bytes, a few merges and markers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from tests.helpers.tokenizers import added_token, tiny_tokenizer_json
from worker.constraints.grammars import Grammars

MERGES = ["t h", "th e", "t r", "tr u", "tru e"]
EOS, THINK, END_THINK = (256 + len(MERGES) + index for index in range(3))
VOCAB = END_THINK + 10
"""Rows of the output layer beyond the tokenizer's ids, as models have them."""


def tokenizer_json() -> str:
    added = [
        added_token(EOS, "<|im_end|>"),
        added_token(THINK, "<think>", special=False),
        added_token(END_THINK, "</think>", special=False),
    ]
    return json.dumps(tiny_tokenizer_json(added, MERGES))


@pytest.fixture
async def grammars() -> AsyncIterator[Grammars]:
    made = Grammars(tokenizer_json(), VOCAB, [EOS])
    yield made
    await made.close()
