"""A router that says, when it ends, how long refusals took from the start of their handlers:
`python -m benchmarks.timed_router serve ...`."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import grpc

from qwire.service import boundary
from router.__main__ import main

TIMES = "QWIRE_REFUSAL_TIMES"
"""Names the file that takes the seconds, a JSON list, but for its ending: the process id."""

_seconds: list[float] = []


class TimedRefusal(boundary._Refusal):
    """Notes the time of every call that is refused unread."""

    async def answer(self, requests: Any, context: Any) -> NoReturn:
        started = time.perf_counter()
        try:
            await super().answer(requests, context)
        finally:
            _seconds.append(time.perf_counter() - started)
            del requests, context  # as the method that it stands for


class TimedGuard(boundary._Guard):
    """Notes the time of every other call that ends RESOURCE_EXHAUSTED."""

    async def answer(self, request: Any, context: Any) -> Any:
        started = time.perf_counter()
        try:
            return await super().answer(request, context)
        finally:
            if context.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                _seconds.append(time.perf_counter() - started)
            del request, context


def save() -> None:
    Path(f"{os.environ[TIMES]}.{os.getpid()}").write_text(json.dumps(_seconds))


boundary._Guard, boundary._Refusal = TimedGuard, TimedRefusal  # type: ignore[misc]

if __name__ == "__main__":
    atexit.register(save)
    sys.exit(main(prog_name="timed router"))
