"""The parent's side of the helper process: start it, ask it, kill it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import struct
import sys
from pathlib import Path
from typing import Any

from worker.constraints.limits import CHECK_SECONDS, MAX_TEXT_BYTES

log = logging.getLogger(__name__)

_HEADER = struct.Struct(">I")
_MAX_REPLY_BYTES = 64 * MAX_TEXT_BYTES
START_SECONDS = 10.0


def _import_root() -> str:
    """The folder that this package is imported from."""
    return str(Path(__file__).resolve().parents[2])


class CheckFailed(Exception):
    """The check took too long, or took the process with it; the text says which."""


class _Gone(Exception):
    """The process ended, or broke the protocol."""


class CheckHelper:
    """Checks constraints one at a time, in a process that is started when there is none."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def check(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends one request, returns the reply. Raises CheckFailed; the process is gone then."""
        async with self._turn:
            if self._process is not None:
                with contextlib.suppress(_Gone):  # perhaps long since: whether the request is to blame is open
                    return await self._ask(self._process, request)
            process = self._process = await self._start()
            try:
                # Interpreter and imports are not the constraint's fault.
                await self._exchange(process, {"kind": "regex", "text": "a", "texts": []}, START_SECONDS)
                return await self._ask(process, request)
            except _Gone as error:
                raise CheckFailed("takes too much memory, or is nested too deep") from error
            except BaseException:
                await self._kill()
                raise

    async def _ask(self, process: asyncio.subprocess.Process, request: dict[str, Any]) -> dict[str, Any]:
        """Raises CheckFailed where it takes too long, _Gone where the process ends."""
        try:
            return await self._exchange(process, request, CHECK_SECONDS)
        except TimeoutError as error:
            await self._kill()
            raise CheckFailed(f"takes more than {CHECK_SECONDS:g} seconds to compile") from error
        except (OSError, EOFError, ValueError, RuntimeError) as error:  # RuntimeError: uvloop's of a closed pipe
            await self._kill()
            raise _Gone from error
        except BaseException:
            await self._kill()
            raise

    async def close(self) -> None:
        """Ends the process."""
        async with self._turn:
            await self._kill()

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "worker.constraints.process", str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # it could hold what clients send
            env={"PYTHONPATH": _import_root(), "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/",
            start_new_session=True,
        )  # fmt: skip

    async def _exchange(
        self, process: asyncio.subprocess.Process, request: dict[str, Any], seconds: float
    ) -> dict[str, Any]:
        if process.stdin is None or process.stdout is None:
            raise EOFError
        body = json.dumps(request).encode("ascii")
        async with asyncio.timeout(seconds):
            process.stdin.write(_HEADER.pack(len(body)) + body)
            await process.stdin.drain()
            (size,) = _HEADER.unpack(await process.stdout.readexactly(_HEADER.size))
            if size > _MAX_REPLY_BYTES:
                raise ValueError
            reply: dict[str, Any] = json.loads(await process.stdout.readexactly(size))
            return reply

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        log.info("the process that checks constraints ended with status %d", await process.wait())
