"""Lines to a file that may be slow to take them."""

from __future__ import annotations

import os
import queue
import threading


class LineWriter:
    """Writes lines from a thread of its own, so that a full pipe stalls nobody; when too many wait, new ones are lost.

    Args:
        descriptor: the file descriptor to write to.
        limit: lines that may wait.
    """

    def __init__(self, descriptor: int, limit: int = 4096) -> None:
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(limit)
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="qwire-log", daemon=True)
        self._thread.start()

    def __call__(self, line: str) -> None:
        """Takes a line; never blocks."""
        try:
            if self._lost:
                self._lines.put_nowait(f"({self._lost} lines were lost: nobody read them)")
                self._lost = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def close(self, timeout: float = 1.0) -> None:
        """Waits until all is written, at most for so many seconds."""
        try:
            self._lines.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _run(self) -> None:
        # os.write, because a thread stuck in a file object's write would hold its lock while the interpreter ends.
        while (line := self._lines.get()) is not None:
            data = f"{line}\n".encode(errors="replace")
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                continue  # A closed terminal is no reason to stop reading what services say.
