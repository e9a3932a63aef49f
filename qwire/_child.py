"""Child processes that never outlive their parent.

`command(argv)` wraps a command line: this file runs as a script first, asks the kernel to kill the process when its
parent dies (prctl(2), PR_SET_PDEATHSIG; it survives execve), and becomes the command. A script, and not a preexec_fn,
because running Python between fork and exec is unsafe in a process with threads, which gRPC starts.

The kernel watches the thread that forked, so that thread must live as long as the child may.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def command(argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` as a child of this process and dies with it."""
    # -I and -S: nothing but the standard library is needed, and starting takes 15 ms less.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv]


def _become(parent: int, argv: list[str]) -> None:
    if sys.platform == "linux":
        import ctypes  # Here, because `command` is imported by programs that have no use for it.

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)  # The parent died before the kernel was asked.
    try:
        os.execvp(argv[0], argv)  # noqa: S606  # No shell is wanted.
    except OSError as error:
        sys.exit(f"can't run {argv[0]}: {error.strerror}")


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
