"""The parent's side of the helper process: start it, ask it, kill it.

It is started by `subprocess`, which forks without running handlers: gRPC's, which asyncio under uvloop would run, can
abort the child of a process that serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from worker.constraints.limits import CHECK_SECONDS, CHECK_WAIT_SECONDS, MAX_TEXT_BYTES

log = logging.getLogger(__name__)

_HEADER = struct.Struct(">I")
_MAX_REPLY_BYTES = 64 * MAX_TEXT_BYTES

_T = TypeVar("_T")


class CheckFailed(Exception):
    """The check took too long, or took the process with it; the text says which."""


class _Gone(Exception):
    """The process ended, or broke the protocol."""


class CheckHelper:
    """Checks constraints one at a time, in a process that is started when there is none."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = asyncio.Lock()
        # The kernel kills the process with the thread that started it: this one stays.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="constraint checks")

    async def check(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends one request, returns the reply. Raises CheckFailed; the process is gone then."""
        request = {**request, "seconds": CHECK_SECONDS}
        async with self._turn:
            if self._process is not None:
                with contextlib.suppress(_Gone):  # perhaps long since: whether the request is to blame is open
                    return await self._ask(self._process, request)
            process = self._process = await self._in_thread(_start)
            try:
                return await self._ask(process, request)
            except _Gone as error:
                raise CheckFailed("takes too much memory, or is nested too deep") from error

    async def close(self) -> None:
        """Ends the process."""
        async with self._turn:
            await self._kill()
        self._thread.shutdown(wait=False)

    async def _ask(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, Any]:
        """Raises CheckFailed where it takes too long, _Gone where the process ends otherwise."""
        too_long = f"takes more than {CHECK_SECONDS:g} seconds to compile"
        try:
            async with asyncio.timeout(CHECK_WAIT_SECONDS):
                return await self._in_thread(lambda: _exchange(process, request))
        except TimeoutError as error:
            await self._kill()
            raise CheckFailed(too_long) from error
        except (OSError, EOFError, ValueError) as error:
            if await self._kill() == -signal.SIGPROF:
                raise CheckFailed(too_long) from error
            raise _Gone from error
        except BaseException:
            await self._kill()
            raise

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _kill(self) -> int | None:
        """Ends the process if it hasn't; returns its status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()  # an exchange that still waits for it comes to its end
        status = await self._in_thread(lambda: _reap(process))
        log.info("the process that checks constraints ended with status %d", status)
        return status


def _start() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "worker.constraints.process", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # it could hold what clients send
        env={"PYTHONPATH": root, "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        start_new_session=True,
    )


def _reap(process: subprocess.Popen[bytes]) -> int:
    status = process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was never read
            if pipe is not None:
                pipe.close()
    return status


def _exchange(process: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, Any]:
    """Raises OSError, EOFError or ValueError where the process is gone or broken."""
    if process.stdin is None or process.stdout is None:
        raise EOFError
    body = json.dumps(request).encode("ascii")
    process.stdin.write(_HEADER.pack(len(body)) + body)
    process.stdin.flush()
    header = process.stdout.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise EOFError
    (size,) = _HEADER.unpack(header)
    if size > _MAX_REPLY_BYTES:
        raise ValueError(f"a reply of {size} bytes")
    reply: dict[str, Any] = json.loads(process.stdout.read(size))
    return reply
