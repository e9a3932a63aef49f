"""Runs a command and shows how its files grow."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from qwire import _child

_POLL_SECONDS = 0.2
_TAIL_BYTES = 2_000


class CommandError(Exception):
    """A command failed; the message has its last lines."""


def run_watched(
    argv: Sequence[str],
    title: str,
    folder: Path,
    total: int,
    progress: TextIO | None,
    environ: Mapping[str, str] | None = None,
) -> None:
    """Runs a command to its end; it dies with this process.

    Args:
        argv: the command line.
        title: what it does, in a few words.
        folder: whose size in bytes shows how far it is.
        total: about the size that `folder` will have.
        progress: a terminal gets a bar, any other file one line, None nothing.
        environ: the environment; None passes on this process's.

    Raises:
        CommandError: it can't be run, or its exit status isn't 0.
    """
    # A file and not a pipe: nobody has to empty it while the command runs.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            _child.command(argv), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environ
        )
        try:
            _watch(process, title, folder, total, progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = log.read().decode(errors="replace").strip()
            raise CommandError(f"{Path(argv[0]).name} ended with status {process.returncode}\n{tail}".strip())


def _watch(process: subprocess.Popen[bytes], title: str, folder: Path, total: int, progress: TextIO | None) -> None:
    if progress is None or not progress.isatty():
        if progress is not None:
            print(title, file=progress, flush=True)
        process.wait()
        return
    # uv shows nothing until it unpacks; the bar's clock still says that something is going on.
    with tqdm(total=total, desc=title, file=progress, unit="B", unit_scale=True) as bar:
        while True:
            try:
                process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                bar.n = min(_size(folder), total)
                bar.refresh()
                continue
            if process.returncode == 0:
                bar.n = total
                bar.refresh()
            return


def _size(folder: Path) -> int:
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # Renamed meanwhile.
    return size
