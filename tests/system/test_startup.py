"""Row 35: a model folder that can't be served ends the start with a message, and nothing ever says SERVING."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.stacks import write_tiny_model


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def strange(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))


@pytest.mark.parametrize(
    ("harm", "shards", "says"),
    [
        (cut, 1, "model.safetensors"),
        (lose, 1, "safetensors"),
        (lose_shard, 3, "model-00002-of-00003.safetensors"),
        (strange, 1, "MambaForCausalLM"),
        (other_shape, 1, "mlp"),
    ],
)
def test_a_broken_model(tmp_path: Path, harm: Callable[[Path], None], shards: int, says: str) -> None:
    folder = write_tiny_model(tmp_path / "tiny", shards=shards)
    harm(folder)
    result = subprocess.run(
        [sys.executable, "-m", "worker", "serve", "--model", str(folder), "--listen", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 3
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert "listening" not in result.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--listen", "0.0.0.0:0"], "--insecure-bind"),
        (["--block-size", "24"], "--block-size"),
        (["--kv-cache-mib", "-1"], "--kv-cache-mib"),
        (["--dtype", "int3"], "--dtype"),
    ],
)
def test_a_wrong_setting(tmp_path: Path, flags: list[str], says: str) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    result = subprocess.run(
        [sys.executable, "-m", "worker", "serve", "--model", str(folder), *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert says in result.stderr


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    (folder / "tokenizer.json").write_text("{}")
    result = subprocess.run(
        [sys.executable, "-m", "tokenizer_svc", "serve", "--model", str(folder), "--listen", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 3
    assert "tokenizer.json" in result.stderr


def test_settings_are_read_before_torch_is_imported() -> None:
    code = "import sys, worker.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
