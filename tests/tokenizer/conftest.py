"""Fixtures shared by the tokenizer tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tokenizers import qwen3_tokenizer  # noqa: F401 (a fixture)
from tokenizer_svc.codec import Codec


@pytest.fixture(scope="session")
def qwen3(qwen3_tokenizer: Path) -> Codec:  # noqa: F811
    return Codec.load(qwen3_tokenizer)
