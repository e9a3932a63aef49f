"""The weights' identity."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from worker.model.errors import ModelError
from worker.model.files import weight_files

PART_BYTES = 64 * 2**20
"""Of a file that are read and hashed at a time: long enough that Python's lock, which another thread may hold for some
milliseconds before each, is a matter of little time."""
PART_BYTES_AHEAD = 8 * 2**20
"""Likewise, while reading ahead: whoever stops it waits for the part at hand."""


class WeightsDigest:
    """The `weights_digest` of a folder, of which a part may be read before it is asked for, and before the process is
    forked: each process goes on from there by itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state = ""
        """`weights_state` of the files that are being read; empty where none are."""

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Has a thread read while the block runs, and waits for it to end when the block is left: a part of
        `PART_BYTES_AHEAD`. What it can't read, `finish` tells of."""
        left = threading.Event()

        def read() -> None:
            with suppress(ModelError, OSError):
                self._begin()
                self._read(PART_BYTES_AHEAD, left)

        thread = threading.Thread(target=read, name="weights digest", daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()

    def finish(self) -> str:
        """Reads what is left; all of it, where files were written to meanwhile. Raises ModelError where they cannot be
        read."""
        try:
            if weights_state(self._folder) != self._state:
                self._begin()
            self._read(PART_BYTES, threading.Event())
        except OSError as error:
            raise ModelError(f"{error.filename or self._folder}: cannot be read: {error.strerror or error}") from error
        return self._total.hexdigest()

    def _begin(self) -> None:
        self._files = weight_files(self._folder)
        """The one that is being read, and those behind it."""
        self._offset = 0
        self._file, self._total = hashlib.sha256(), hashlib.sha256()
        self._state = weights_state(self._folder)

    def _read(self, part_bytes: int, left: threading.Event) -> None:
        """Until all is read or `left` is set. Whatever ends it, it can be called again."""
        part = memoryview(bytearray(part_bytes if self._files else 0))
        while self._files and not left.is_set():
            # Opened for each part: processes forked from this one have places of their own in it.
            with self._files[0].open("rb", buffering=0) as file:
                file.seek(self._offset)
                count = file.readinto(part)
            if count:
                self._file.update(part[:count])
                self._offset += count
            else:
                self._total.update(self._file.digest())
                self._file, self._offset = hashlib.sha256(), 0
                del self._files[0]


def weights_digest(folder: Path) -> str:
    """SHA-256 (hex) over the SHA-256 of each weight file's bytes, in the order of their names.

    Two folders with one digest compute the same numbers, given the same configuration. About 0.6 s a GB on a CPU with
    SHA instructions. Raises ModelError where the files cannot be read.
    """
    return WeightsDigest(folder).finish()


def weights_state(folder: Path) -> str:
    """A hash of what the file system says of the weight files: which they are, their sizes, when they were written.
    While it stays the same, so does their digest, which takes reading them. Raises ModelError where one is missing."""
    states = []
    for path in weight_files(folder):
        stat = path.stat()
        states.append(f"{path.name} {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}")
    return hashlib.sha256("\n".join(states).encode()).hexdigest()
