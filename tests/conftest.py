"""Fixtures that every folder of tests shares."""

from tests.helpers.demo import demo_folder, demo_gguf
from tests.helpers.tokenizers import qwen3_tokenizer

__all__ = ["demo_folder", "demo_gguf", "qwen3_tokenizer"]
