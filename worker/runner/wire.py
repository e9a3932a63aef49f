"""A rank group's orders as bytes: protobuf, because it is data and nothing else."""

from __future__ import annotations

from qwire.v1 import plan_pb2 as pb
from worker.engine.plan import Chunk, Draw, SamplingParams, StepPlan

BEAT = pb.RankOrder(beat=pb.RankBeat()).SerializeToString()
STOP = pb.RankOrder(stop=pb.RankStop()).SerializeToString()

_DRAWN_ELSEWHERE = Draw(SamplingParams(), 0, 0)


def encode_step(plan: StepPlan) -> bytes:
    """The order to execute `plan`. Raises ValueError for ids and positions that no unsigned integer holds."""
    return pb.RankOrder(
        step=pb.PlannedStep(
            chunks=[
                pb.PlannedChunk(
                    token_ids=chunk.token_ids,
                    start=chunk.start,
                    block_table=chunk.block_table,
                    draws=len(chunk.draws),
                    drafts=chunk.drafts,
                    scored=len(chunk.scored),
                )
                for chunk in plan.chunks
            ],
            copies=[pb.PlannedCopy(source=source, target=target) for source, target in plan.copies],
        )
    ).SerializeToString()


def decode_step(step: pb.PlannedStep) -> StepPlan:
    """The plan as ranks other than 0 see it: where tokens are drawn and scored, but not how."""
    return StepPlan(
        tuple(
            Chunk(
                token_ids=tuple(chunk.token_ids),
                start=chunk.start,
                block_table=tuple(chunk.block_table),
                draws=(_DRAWN_ELSEWHERE,) * chunk.draws,
                drafts=chunk.drafts,
                scored=(0,) * chunk.scored,
            )
            for chunk in step.chunks
        ),
        tuple((copy.source, copy.target) for copy in step.copies),
    )
