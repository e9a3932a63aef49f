"""The rules of failover: wherever workers are lost, the stream is the one that an unbroken run gives."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

from hypothesis import given, settings
from hypothesis import strategies as st

from qwire.v1 import generation_pb2 as pb
from qwire.v1 import worker_pb2
from router.choice import OutputSpec
from router.journal import Journal
from tests.helpers.fake_runner import FakeRunner
from worker.engine.engine import Engine, SequenceReport
from worker.engine.scheduler import SchedulerLimits
from worker.frames import add_report, engine_request, valid

VOCABULARY = 12


class Worker:
    """An engine behind the frames of the worker link, stepped by hand."""

    def __init__(self, submit: worker_pb2.Submit, budget: int, drafts: int) -> None:
        assert valid(submit, VOCABULARY)
        faults: list[list[Hashable]] = []
        self.engine = Engine(
            FakeRunner(64, 4, VOCABULARY, memory=2),
            SchedulerLimits(max_step_tokens=budget, max_draft_tokens=drafts),
            max_waiting=8,
            clock=lambda: 0.0,
            deliver=lambda report: None,
            fault=faults.append,
        )
        self.engine.submit(engine_request(submit, 1))

    def step(self) -> list[SequenceReport] | None:
        report = self.engine.step()
        return None if report is None else report.sequences


def run(
    prompt: list[int], params: worker_pb2.ResolvedParams, count: int, budget: int, drafts: int, lost_after: list[int]
) -> tuple[list[list[int]], list[pb.Finished], int]:
    """Ids and ends of the choices of one stream, and how often it moved, where each worker but the last is lost after
    so many steps."""

    async def stream() -> tuple[list[list[int]], list[pb.Finished], int]:
        spec = OutputSpec(pb.StopOptions(max_tokens=params.max_tokens), False, True, 4096)
        journal = Journal(spec, range(count), len(prompt), 0.0, lambda: 1.0)
        ids: list[list[int]] = [[] for _ in range(count)]
        finished: dict[int, pb.Finished] = {}

        def read() -> None:
            for message in journal._take_messages():
                if message.HasField("finished"):
                    finished[message.finished.choice] = message.finished
                else:
                    assert message.delta.token_index == len(ids[message.delta.choice])
                    ids[message.delta.choice] += message.delta.token_ids

        lives = iter(lost_after)
        while journal.needs_worker:
            journal.submitted("w")
            submit = worker_pb2.Submit(
                prompt_ids=prompt, choices=journal.submit_choices(), params=params, prefix_root=b"r" * 16
            )
            worker, left = Worker(submit, budget, drafts), next(lives, 10_000)
            while left and journal.needs_worker and (reports := worker.step()) is not None:
                left -= 1
                frame = worker_pb2.Step()
                for report in reports:
                    add_report(frame, 1, report)
                for sequence in frame.sequences:
                    journal.receive(sequence)
                if left % 2:
                    read()
            journal.moves += journal.needs_worker
        read()
        return ids, [finished[choice] for choice in range(count)], journal.moves

    return asyncio.run(stream())


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
    count=st.integers(1, 4),
    most=st.integers(1, 24),
    stops=st.lists(st.integers(0, VOCABULARY - 1), max_size=2),
    budget=st.integers(1, 16),
    drafts=st.integers(0, 5),
    lost_after=st.lists(st.integers(0, 8), max_size=5),
)
def test_a_stream_is_the_same_wherever_its_workers_are_lost(
    prompt: list[int], count: int, most: int, stops: list[int], budget: int, drafts: int, lost_after: list[int]
) -> None:
    params = worker_pb2.ResolvedParams(
        top_p=1.0, repetition_penalty=1.0, max_tokens=most, stop_token_ids=stops, eos_token_ids=[3]
    )
    ids, ends, _ = run(prompt, params, count, budget, 0, [])
    moved_ids, moved_ends, moves = run(prompt, params, count, budget, drafts, lost_after)
    assert moved_ids == ids
    assert moves <= len(lost_after)
    for end, moved in zip(ends, moved_ends, strict=True):
        assert (moved.reason, moved.stop_token_id) == (end.reason, end.stop_token_id)
        assert moved.usage.generated_tokens == end.usage.generated_tokens
