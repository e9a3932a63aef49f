"""`run_stack.py`: what `qwire up` does once it has a model, with stand-ins for the services."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import qwire.cli  # noqa: F401  # sets what gRPC writes, before it is imported
from qwire.stack import Commands, RestartPolicy, Stack, StackConfig, StackError, serve


def config(**changes: object) -> StackConfig:
    fake = (sys.executable, str(Path(__file__).with_name("fake_service.py")))
    values: dict[str, object] = {
        "model": Path("/model"),
        "served_model_name": "fake",
        "listen": "127.0.0.1:0",
        "commands": Commands(tokenizer=(*fake, "-"), worker=(*fake, "-"), router=(*fake, "-")),
        "restart": RestartPolicy(first_delay=0.05),
        **changes,
    }
    return StackConfig(**values)  # type: ignore[arg-type]


def ready(stack: Stack) -> None:
    print(f"ready on {stack.address} {stack.pids}", flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(serve(config(), ready))
    except StackError as error:
        sys.exit(str(error))
