"""A router that says, when it ends, how long refusals took from the start of their handlers:
`python -m benchmarks.timed_router serve ...`."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import grpc

from qwire.errors import QwireError
from qwire.service import interceptors
from router.__main__ import main

TIMES = "QWIRE_REFUSAL_TIMES"
"""Names the file that takes the seconds, a JSON list."""

_seconds: list[float] = []
_Guard = interceptors._Guard


class TimedGuard(_Guard):
    """Notes the time of every call that ends RESOURCE_EXHAUSTED: one `_Guard` is made for each call."""

    _started = 0.0

    async def unary(self, request: Any, context: Any) -> Any:
        self._started = time.perf_counter()
        return await super().unary(request, context)

    async def stream(self, request: Any, context: Any) -> None:
        self._started = time.perf_counter()
        await super().stream(request, context)

    async def _end(self, context: Any, error: Exception) -> None:
        try:
            await super()._end(context, error)
        finally:
            if isinstance(error, QwireError) and error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                _seconds.append(time.perf_counter() - self._started)


def save() -> None:
    Path(os.environ[TIMES]).write_text(json.dumps(_seconds))


interceptors._Guard = TimedGuard  # type: ignore[misc]

if __name__ == "__main__":
    atexit.register(save)
    sys.exit(main(prog_name="timed router"))
