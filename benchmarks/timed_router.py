"""A router that says, when it ends, how long refusals took in its own code:
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
from qwire.service import accepts, boundary
from router.__main__ import main

TIMES = "QWIRE_REFUSAL_TIMES"
"""Names the file that takes the seconds, a JSON list, but for its ending: the process id."""

_seconds: list[float] = []


async def timed_refusal(context: Any, error: QwireError) -> None:
    """Notes the time of every call that is refused unread."""
    started = time.perf_counter()
    await refuse(context, error)
    _seconds.append(time.perf_counter() - started)
    del context  # as the function that it stands for


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


boundary._Guard = TimedGuard  # type: ignore[misc]
refuse, accepts._refuse = accepts._refuse, timed_refusal

if __name__ == "__main__":
    atexit.register(save)
    sys.exit(main(prog_name="timed router"))
