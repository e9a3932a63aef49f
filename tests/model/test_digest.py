"""The weights' digest, read at once, ahead, and in parts by several processes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.helpers.models import write_random_qwen3
from worker.model import ModelError, WeightsDigest, digest, weights_digest


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a thread that reads ahead is seldom at the end when it is told to stop."""
    monkeypatch.setattr(digest, "PART_BYTES", 4096)


@pytest.mark.usefixtures("small_parts")
def test_what_is_read_ahead_is_the_beginning(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path, shards=2)
    weights = WeightsDigest(folder)
    before = threading.active_count()
    with weights.reading_ahead():
        pass
    assert threading.active_count() == before, "the process may be forked now"
    assert weights.finish() == weights_digest(folder)
    assert weights.finish() == weights_digest(folder), "again"


@pytest.mark.usefixtures("small_parts")
def test_forked_processes_go_on_by_themselves(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path, shards=2)
    weights = WeightsDigest(folder)
    with weights.reading_ahead():
        pass
    for _ in range(2):
        reader, writer = os.pipe()
        if not (pid := os.fork()):
            try:
                os.write(writer, weights.finish().encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            assert pipe.read().decode() == weights_digest(folder)
        os.waitpid(pid, 0)
    assert weights.finish() == weights_digest(folder)


def test_files_that_change_are_read_anew(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path, shards=2)
    weights = WeightsDigest(folder)
    with weights.reading_ahead():
        pass
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
