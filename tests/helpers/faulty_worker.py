"""A worker whose steps raise where a prompt says so, and take their time while a brake is on:
`python -m tests.helpers.faulty_worker serve ...`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from worker.__main__ import main
from worker.engine.plan import Drawn, StepPlan
from worker.runner.runner import TorchRunner

POISON = [99, 98, 97, 96]
"""A prompt that begins so crashes whatever worker runs it."""
ONCE = [95, 94, 93, 92]
"""The same, but only one worker: a file, whose name is in MARK, remembers it."""
MARK = "FAULTY_WORKER_MARK"
BRAKE = "FAULTY_WORKER_BRAKE"
"""Names the file that is the brake: while it is there, steps with a sequence beyond BRAKED_FROM are slow, so that
streams are surely still running when a fault comes, however fast the kernels are."""
BRAKED_FROM = 60
BRAKED_STEP_SECONDS = 0.05

_execute = TorchRunner.execute
_brake = Path(os.environ.get(BRAKE, "/nonexistent"))


def execute(self: TorchRunner, plan: StepPlan) -> list[list[Drawn]]:
    for chunk in plan.chunks:
        begins = list(chunk.token_ids[:4])
        if begins == POISON:
            raise RuntimeError("poisoned")
        if begins == ONCE and not (mark := Path(os.environ[MARK])).exists():
            mark.touch()
            raise RuntimeError("once")
    if any(chunk.start > BRAKED_FROM for chunk in plan.chunks) and _brake.exists():
        time.sleep(BRAKED_STEP_SECONDS)
    return _execute(self, plan)


TorchRunner.execute = execute  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(prog_name="faulty worker"))
