"""A router that says, when it ends, how long refusals took from the start of their handlers:
`python -m benchmarks.timed_router serve ...`."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from qwire.service import interceptors
from router.__main__ import main

TIMES = "QWIRE_REFUSAL_TIMES"
"""Names the file that takes the seconds, a JSON list, but for its ending: the process id."""

_seconds: list[float] = []
_Guard = interceptors._Guard


class TimedGuard(_Guard):
    """Notes the time of every call that ends RESOURCE_EXHAUSTED."""

    async def unary(self, request: Any, context: Any) -> Any:
        with _noted(context):
            return await super().unary(request, context)

    async def stream(self, request: Any, context: Any) -> None:
        with _noted(context):
            await super().stream(request, context)


@contextmanager
def _noted(context: Any) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    except grpc.aio.AbortError:
        if context.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
            _seconds.append(time.perf_counter() - started)
        raise


def save() -> None:
    Path(f"{os.environ[TIMES]}.{os.getpid()}").write_text(json.dumps(_seconds))


interceptors._Guard = TimedGuard  # type: ignore[misc]

if __name__ == "__main__":
    atexit.register(save)
    sys.exit(main(prog_name="timed router"))
