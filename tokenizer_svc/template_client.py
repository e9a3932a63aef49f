"""The parent's side of the template helper: start it, ask it, kill it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer_svc.errors import ChatError, ChatFailure

_HEADER = struct.Struct(">I")
_MAX_EXPANSION = 6  # bytes of JSON for one byte of output, at worst: \u0000
_REPLY_OVERHEAD = 1 << 20  # what a reply may hold besides output: a template's literals


@dataclass(frozen=True)
class ChatLimits:
    """Bounds on rendering chats.

    Attributes:
        render_seconds: wall clock of one render, after which the helper is killed.
        start_seconds: wall clock of starting the helper and compiling the templates.
        memory_bytes: address space of the helper above what it has when it starts.
        output_bytes: rendered text, in UTF-8.
        input_bytes: a chat with its tools and extra values, as JSON in UTF-8.
        input_depth: nesting of lists and objects in a chat.
        template_bytes: a template's source, in UTF-8.
        max_waiting: renders that may wait for the one that runs.
    """

    render_seconds: float = 2.0
    start_seconds: float = 10.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 4 << 20
    input_bytes: int = 8 << 20
    input_depth: int = 64
    template_bytes: int = 1 << 20
    max_waiting: int = 64

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            least = 0 if name == "max_waiting" else 1e-3
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least:g}")


def _import_root() -> str:
    """The folder that this package is imported from."""
    return str(Path(__file__).resolve().parent.parent)


class HelperGoneError(Exception):
    """The helper ended, or broke the protocol, before it answered."""


class TemplateHelper:
    """One helper process with its templates loaded. One exchange at a time: the caller sees to that."""

    def __init__(self, process: asyncio.subprocess.Process, limits: ChatLimits) -> None:
        self._process = process
        self._limits = limits
        self.literals: tuple[str, ...] = ()
        self.names: frozenset[str] = frozenset()

    @classmethod
    async def start(cls, templates: Mapping[str, str], limits: ChatLimits) -> TemplateHelper:
        """Start a process and load the templates into it.

        Raises:
            ChatError: TEMPLATE_REFUSED, also for one that takes too long or too much memory to compile; CRASHED.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "tokenizer_svc.template_process", str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # a traceback could hold a chat
            # Nothing of our environment is the template's business. A fixed hash seed renders sets in one order.
            env={
                "PYTHONPATH": _import_root(), "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            cwd="/",
            start_new_session=True,
        )  # fmt: skip
        helper = cls(process, limits)
        try:
            await helper._load(templates)
        except BaseException:
            await helper.kill()
            raise
        return helper

    async def _load(self, templates: Mapping[str, str]) -> None:
        request = {
            "templates": dict(templates),
            "memory_bytes": self._limits.memory_bytes,
            "output_bytes": self._limits.output_bytes,
        }
        try:
            reply = await self.ask(json.dumps(request).encode("ascii"), self._limits.start_seconds)
        except TimeoutError as error:
            message = f"compiling the chat template took more than {self._limits.start_seconds:g} s"
            raise ChatError(ChatFailure.TEMPLATE_REFUSED, message) from error
        except HelperGoneError as error:
            raise ChatError(ChatFailure.CRASHED, "the template helper did not start") from error
        if "failure" in reply:
            detail = str(reply["detail"]) or "it takes too much memory to compile"
            raise ChatError(ChatFailure.TEMPLATE_REFUSED, f"the chat template is refused: {detail}")
        self.literals = tuple(reply["literals"])
        self.names = frozenset(reply["names"])

    @property
    def alive(self) -> bool:
        """Whether the process had not ended when last looked at."""
        return self._process.returncode is None

    async def ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Send one JSON request, return the reply. After an exception the helper is dead.

        Raises:
            TimeoutError: no answer in `seconds`.
            HelperGoneError: the process ended.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise HelperGoneError
        try:
            async with asyncio.timeout(seconds):
                self._process.stdin.write(_HEADER.pack(len(request)) + request)
                await self._process.stdin.drain()
                (size,) = _HEADER.unpack(await self._process.stdout.readexactly(_HEADER.size))
                if size > _MAX_EXPANSION * (self._limits.output_bytes + self._limits.template_bytes) + _REPLY_OVERHEAD:
                    raise HelperGoneError
                reply = json.loads(await self._process.stdout.readexactly(size))
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            await self.kill()
            if isinstance(error, TimeoutError):
                raise
            raise HelperGoneError from error
        except BaseException:
            await self.kill()
            raise
        if not isinstance(reply, dict):
            await self.kill()
            raise HelperGoneError
        return reply

    async def kill(self) -> None:
        """End the process at once and reap it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()
