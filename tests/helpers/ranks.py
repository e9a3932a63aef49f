"""A group of real ranks that runs step plans without an engine: `python -m tests.helpers.ranks JOBS OUT`.

One process imports torch and forks all ranks, as a worker does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwire.v1 import plan_pb2
from worker.engine.plan import StepPlan
from worker.parallel import Group, Place, run_ranks
from worker.runner import TorchRunner
from worker.runner.wire import decode_step, encode_step


@dataclass(frozen=True)
class Job:
    """Plans to run one after another on a fresh runner."""

    folder: Path
    plans: Sequence[StepPlan]
    dtype: str = "auto"
    num_blocks: int = 256


def result(runner: TorchRunner, plan: StepPlan) -> Tensor:
    """Of a plan without draws its logits, float32 [plan.num_tokens, V]; of another, which is executed, ids and
    log-probabilities of what was scored and drawn, float64 [entries, 2]."""
    if not any(chunk.draws for chunk in plan.chunks):
        return runner.forward_logits(plan)
    drawn = [(token.token_id, token.logprob or 0.0) for tokens in runner.execute(plan) for token in tokens]
    return torch.tensor(drawn, dtype=torch.float64)


def results_on_ranks(world: int, jobs: Sequence[Job], scratch: Path, stages: int = 1) -> list[list[Tensor]]:
    """Each job's results, plan by plan, as `stages` of `world` ranks compute them together."""
    scratch.mkdir(parents=True, exist_ok=True)
    described = [
        {
            "folder": str(job.folder),
            "dtype": job.dtype,
            "num_blocks": job.num_blocks,
            "plans": [encode_step(plan).hex() for plan in job.plans],
        }
        for job in jobs
    ]
    (scratch / "jobs.json").write_text(json.dumps({"world": world, "stages": stages, "jobs": described}))
    argv = [sys.executable, "-m", "tests.helpers.ranks", str(scratch / "jobs.json"), str(scratch / "out.safetensors")]
    subprocess.run(argv, check=True, timeout=100)
    out = load_file(scratch / "out.safetensors")
    return [[out[f"{number}.{step}"] for step in range(len(job.plans))] for number, job in enumerate(jobs)]


def _main(jobs: Path, out: Path) -> int:
    given = json.loads(jobs.read_text())

    def rank(place: Place) -> int:
        torch.set_num_threads(1)
        group = Group(place.rank, given["world"], given["stages"])
        group.connect(place.meeting, timeout=30)
        results = {}
        for number, job in enumerate(given["jobs"]):
            runner = TorchRunner(Path(job["folder"]), num_blocks=job["num_blocks"], dtype=job["dtype"], group=group)
            for step, order in enumerate(job["plans"]):
                plan = decode_step(plan_pb2.RankOrder.FromString(bytes.fromhex(order)).step)
                results[f"{number}.{step}"] = result(runner, plan)
        if place.rank == 0:
            save_file(results, out)
        group.meet()
        return 0

    return run_ranks(given["world"] * given["stages"], rank, final=(1,))


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
