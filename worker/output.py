"""Folders that commands write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputError(Exception):
    """A folder cannot be written; the message says which and why."""


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A sibling of `out` that becomes `out` at the end, or is removed. Raises OutputError."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
