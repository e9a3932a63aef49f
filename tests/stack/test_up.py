"""What `qwire up` makes of its flags."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qwire.cli import main
from qwire.stack import StackConfig

up = importlib.import_module("qwire.cli.up")


def config_of(monkeypatch: pytest.MonkeyPatch, folder: Path, *args: str) -> StackConfig:
    found: list[StackConfig] = []

    async def serve(config: StackConfig, on_ready: Any) -> None:
        found.append(config)

    monkeypatch.setattr(up, "serve", serve)
    (folder / "config.json").write_text("{}")
    result = CliRunner().invoke(main, ["up", str(folder), *args])
    assert result.exit_code == 0, result.output
    return found[0]


def test_several_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(up.os, "sched_getaffinity", lambda pid: set(range(8)))
    config = config_of(monkeypatch, tmp_path, "--workers", "3", "--kv-cache-mib", "64", "--worker-flags", "--threads 4")
    assert config.workers == 3
    assert list(config.worker_flags) == ["--kv-cache-mib", "64", "--threads", "2", "--threads", "4"]


def test_one_worker_takes_what_torch_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list(config_of(monkeypatch, tmp_path).worker_flags) == []


def test_placement_is_the_routers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list(config_of(monkeypatch, tmp_path, "--placement", "round-robin").router_flags)[:2] == [
        "--placement",
        "round-robin",
    ]
