"""Names of models to folders."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwire.hub import HubError, cache_folder, resolve, served_name


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    with pytest.raises(HubError, match=r"no config\.json"):
        resolve(str(folder))
    (folder / "config.json").write_text("{}")
    assert resolve(str(folder)) == folder
    assert served_name(str(folder)) == "my-model"
    assert served_name(f"{folder}/") == "my-model"


def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "file.gguf").touch()
    with pytest.raises(HubError, match="is a file"):
        resolve(str(tmp_path / "file.gguf"))
    for name in (str(tmp_path / "missing"), "./missing", "missing", "a/b/c", "../x", ""):
        with pytest.raises(HubError, match="no folder"):
            resolve(name)


def test_served_names() -> None:
    assert served_name("demo") == "demo"
    assert served_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_cache_folder() -> None:
    assert cache_folder({"QWIRE_CACHE": "/q", "XDG_CACHE_HOME": "/x"}) == Path("/q")
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/qwire")
    assert cache_folder({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "qwire"
    assert cache_folder({}) == Path.home() / ".cache" / "qwire"


def fake_hub(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    module = ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def download(name: str, allow_patterns: list[str]) -> str:
        calls.append((name, allow_patterns))
        return str(tmp_path)

    fake_hub(monkeypatch, download)
    with pytest.raises(HubError, match=r"no config\.json"):
        resolve("Qwen/Qwen3-0.6B")
    (tmp_path / "config.json").write_text("{}")
    assert resolve("Qwen/Qwen3-0.6B") == tmp_path
    assert calls[1] == ("Qwen/Qwen3-0.6B", ["*.json", "*.jinja", "*.txt", "*.safetensors"])


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("secret details")

    fake_hub(monkeypatch, download)
    with pytest.raises(HubError, match=r"can't download 'a/b' \(ConnectionError\)") as caught:
        resolve("a/b")
    assert "secret" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match="pip install huggingface_hub"):
        resolve("a/b")
