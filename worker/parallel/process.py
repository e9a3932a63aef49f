"""What a forked process does to become a rank."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from typing import NoReturn

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def become_rank(main: Callable[[], int], parent: int, *, leader: bool, mask: Collection[int]) -> NoReturn:
    """Runs `main` in a process just forked and ends the process with its status.

    Nothing of the parent's call stack is unwound: its cleaning up is the parent's own affair.

    Args:
        parent: process id of who forked, with whom this process dies.
        leader: whether stopping signals concern this rank. The others are stopped by the leader, in the order that a
            drain needs, even where a terminal or a service manager signals all processes at once.
        mask: the signal mask to run under.
    """
    status = 1
    try:
        _die_with(parent)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if leader else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        log.exception("a rank failed")
    finally:
        # Not sys.exit: the transports' threads may be waiting for peers that are gone.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent dies (prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it died before the kernel was asked
