"""What a worker does about its memory once it serves."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import cast

import pytest

from tests.helpers.memory import missing
from tests.helpers.models import write_random_qwen3
from tests.helpers.stacks import eventually
from worker import loading
from worker.kernels import choose_kernels
from worker.runner.runner import TorchRunner


class _Runner:
    def __init__(self) -> None:
        self.gathered = threading.Event()
        self.niceness = 0

    def gather_pages(self) -> bool:
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.gathered.set()
        return True


def test_pages_are_gathered_behind_everything_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(loading, "GATHER_AFTER_SECONDS", 0.0)
    runner, own = _Runner(), os.getpriority(os.PRIO_PROCESS, 0)
    loading.gather_pages_later(cast(TorchRunner, runner))
    assert runner.gathered.wait(30)
    assert runner.niceness == 19
    assert eventually(lambda: loading.GATHERED in caplog.text, 10)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_keys_and_values_get_all_their_memory(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path, dtype="bfloat16")
    runner = TorchRunner(folder, num_blocks=4096, kernels=choose_kernels("cpu").kernels, kv_dtype="int8")
    tensors = [tensor for cache in runner.caches for tensor in cache.tensors]
    assert all(map(missing, tensors))
    assert runner.gather_pages()
    assert not any(map(missing, tensors))
    assert not any(tensor.any() for tensor in tensors)


def test_other_backends_have_nothing_to_gather(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path, dtype="bfloat16")
    assert not TorchRunner(folder, num_blocks=16, kernels=choose_kernels("reference").kernels).gather_pages()
