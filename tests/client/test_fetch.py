"""`qwire fetch`, of models that are folders: how the others are had is tested with the hub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def fetch(*args: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwire", "fetch", *args], capture_output=True, text=True, timeout=60, check=False
    )


def test_fetch_links_to_the_model_and_swaps_it(tmp_path: Path) -> None:
    for name in ("inside/cache/one", "outside/two"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(name)
    link = tmp_path / "inside" / "current"
    one, two = tmp_path / "inside/cache/one", tmp_path / "outside/two"
    result = fetch(one)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{one}\n", "")
    assert fetch(one, "--to", link).stdout == f"{link}\n"
    # What lies beside it can be mounted elsewhere.
    assert link.readlink() == Path("cache/one")
    inode = link.lstat().st_ino
    assert fetch(one, "--to", link).returncode == 0
    assert link.lstat().st_ino == inode
    assert fetch(two, "--to", link).returncode == 0
    assert link.readlink() == two
    assert sorted(file.name for file in link.parent.iterdir()) == ["cache", "current"]


def test_fetch_leaves_what_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    result = fetch(tmp_path, "--to", tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "is no link" in result.stderr
    result = fetch(tmp_path, "--to", tmp_path / "config.json" / "x")
    assert result.returncode == 1
    assert "Not a directory" in result.stderr or "File exists" in result.stderr
    result = fetch(tmp_path / "missing", "--to", tmp_path / "link")
    assert result.returncode == 1
    assert "no folder" in result.stderr
    assert not (tmp_path / "link").is_symlink()
