"""What a worker does about its weights once it serves."""

from __future__ import annotations

import os
import threading
from typing import cast

import pytest

from worker import loading
from worker.runner.runner import TorchRunner


class _Runner:
    def __init__(self) -> None:
        self.gathered = threading.Event()
        self.niceness = 0

    def gather_pages(self) -> None:
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self.gathered.set()


def test_pages_are_gathered_behind_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "GATHER_AFTER_SECONDS", 0.0)
    runner, own = _Runner(), os.getpriority(os.PRIO_PROCESS, 0)
    loading.gather_pages_later(cast(TorchRunner, runner))
    assert runner.gathered.wait(30)
    assert runner.niceness == 19
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
