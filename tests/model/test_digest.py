"""The weights' digest, read at once, ahead, and in parts by several processes."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import write_random_qwen3
from worker.model import ModelError, WeightsDigest, digest, weights_digest

READ_AHEAD = 5
"""Parts that are read before a block below is left: they end within a file."""


class CountingHash:
    """SHA-256, and how many parts all of them were given since the last reset."""

    parts = 0
    held = False
    """Whether parts from READ_AHEAD on take so long that whoever waits for them has time to see it."""

    def __init__(self, data: bytes = b"") -> None:
        self._hash = hashlib.new("sha256", data)

    def update(self, data: Any) -> None:
        CountingHash.parts += 1
        if CountingHash.held and CountingHash.parts >= READ_AHEAD:
            time.sleep(0.1)
        self._hash.update(data)

    def digest(self) -> bytes:
        return self._hash.digest()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> type[CountingHash]:
    """Counts parts, which are small."""
    monkeypatch.setattr(digest, "PART_BYTES", 4096)
    monkeypatch.setattr(digest, "PART_BYTES_AHEAD", 4096)
    monkeypatch.setattr(hashlib, "sha256", CountingHash)
    CountingHash.parts = 0
    return CountingHash


def read_ahead(weights: WeightsDigest, parts: type[CountingHash]) -> int:
    """Has some parts read, and returns how many were."""
    parts.parts, parts.held = 0, True
    deadline = time.monotonic() + 20
    with weights.reading_ahead():
        while parts.parts < READ_AHEAD:
            assert time.monotonic() < deadline, "nothing is read"
            time.sleep(0)
    parts.held = False
    return parts.parts


def test_what_is_read_ahead_is_not_read_again(tmp_path: Path, parts: type[CountingHash]) -> None:
    folder = write_random_qwen3(tmp_path, shards=2)
    wanted = weights_digest(folder)
    whole = parts.parts
    weights = WeightsDigest(folder)
    before = threading.active_count()
    ahead = read_ahead(weights, parts)
    assert threading.active_count() == before, "the process may be forked now"
    assert ahead < whole
    assert weights.finish() == wanted
    assert parts.parts == whole
    assert weights.finish() == wanted
    assert parts.parts == whole, "nothing is left to read"


def test_forked_processes_go_on_by_themselves(tmp_path: Path, parts: type[CountingHash]) -> None:
    folder = write_random_qwen3(tmp_path, shards=2)
    wanted = weights_digest(folder)
    whole = parts.parts
    weights = WeightsDigest(folder)
    read_ahead(weights, parts)
    for _ in range(2):
        reader, writer = os.pipe()
        if not (pid := os.fork()):
            try:
                os.write(writer, f"{weights.finish()} {parts.parts}".encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            assert pipe.read().decode() == f"{wanted} {whole}"
        os.waitpid(pid, 0)
    assert weights.finish() == wanted


def test_files_that_change_are_read_anew(tmp_path: Path, parts: type[CountingHash]) -> None:
    folder = write_random_qwen3(tmp_path, shards=2)
    weights = WeightsDigest(folder)
    read_ahead(weights, parts)
    before = weights.finish()
    shard = next(folder.glob("*-00001-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert before != weights.finish() == weights_digest(folder)


def test_what_cannot_be_read_is_told_at_the_end(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path, shards=2)
    next(folder.glob("*-00002-of-*.safetensors")).unlink()
    weights = WeightsDigest(folder)
    with weights.reading_ahead():
        pass
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: missing"):
        weights.finish()
