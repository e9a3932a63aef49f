"""A worker whose steps raise where a prompt says so: `python -m tests.faults.faulty_worker serve ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from worker.__main__ import main
from worker.engine.plan import Drawn, StepPlan
from worker.runner.runner import TorchRunner

POISON = [99, 98, 97, 96]
"""A prompt that begins so crashes whatever worker runs it."""
ONCE = [95, 94, 93, 92]
"""The same, but only one worker: a file, whose name is in MARK, remembers it."""
MARK = "FAULTY_WORKER_MARK"

_execute = TorchRunner.execute


def execute(self: TorchRunner, plan: StepPlan) -> list[list[Drawn]]:
    for chunk in plan.chunks:
        begins = list(chunk.token_ids[:4])
        if begins == POISON:
            raise RuntimeError("poisoned")
        if begins == ONCE and not (mark := Path(os.environ[MARK])).exists():
            mark.touch()
            raise RuntimeError("once")
    return _execute(self, plan)


TorchRunner.execute = execute  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(prog_name="faulty worker"))
