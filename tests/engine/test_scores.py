"""Log-probabilities of prompts: each token's once and in order, whatever is cached, cut up or preempted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwire import prefix
from tests.helpers.fake_runner import FakeRunner, continuation
from worker.engine.engine import Engine
from worker.engine.plan import Drawn
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.frames import LOGPROBS_PER_FRAME, prompt_logprob_frames

ROOT = prefix.root(b"model", "float32", 4, "", b"")


@settings(max_examples=80, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=8),
    choices=st.integers(1, 2),
    num_blocks=st.integers(14, 40),
    max_step_tokens=st.integers(1, 50),
    drafts=st.integers(0, 4),
    gaps=st.lists(st.integers(0, 4), min_size=8, max_size=8),
)
def test_scores_come_once_and_whole(
    prompts: list[list[int]], choices: int, num_blocks: int, max_step_tokens: int, drafts: int, gaps: list[int]
) -> None:
    runner = FakeRunner(num_blocks, 4)
    engine = Engine(
        runner,
        SchedulerLimits(max_step_tokens, 8, max_draft_tokens=drafts),
        max_waiting=99,
        clock=lambda: 0.0,
        deliver=lambda report: None,
        fault=lambda keys: None,
    )
    ids: dict[tuple[object, int], list[int]] = {}
    scores: dict[object, list[Drawn]] = {}

    def step() -> bool:
        report = engine.step()
        for sequence in report.sequences if report is not None else []:
            ids.setdefault((sequence.key, sequence.choice), []).append(sequence.drawn.token_id)
            if sequence.start is not None:
                assert sequence.key not in scores
                scores[sequence.key] = list(sequence.start.prompt_scores)
        engine.pool.check()
        return report is not None

    for number, prompt in enumerate(prompts):
        wanted = 2 if number % 3 != 2 else None
        request = Request(
            number, prompt, choices=[()] * choices, max_tokens=12, prefix_root=ROOT, prompt_logprobs=wanted
        )
        engine.submit(request)
        for _ in range(gaps[number]):
            step()
    while step():
        pass
    for number, prompt in enumerate(prompts):
        expected = [Drawn(token, float(position)) for position, token in enumerate(prompt[1:])]
        assert scores[number] == (expected if number % 3 != 2 else [])
        for choice in range(choices):
            assert ids[number, choice] == continuation(prompt, 12, choice=choice)


@pytest.mark.parametrize("top", [0, 1, 20])
def test_frames_of_scores_are_small_and_whole(top: int) -> None:
    scores = [Drawn(number, -0.5, tuple((other, -1.0) for other in range(top))) for number in range(40_000)]
    seen: list[int] = []
    for frame in prompt_logprob_frames(7, scores):
        part = frame.prompt_logprobs
        assert (part.attempt, part.first) == (7, len(seen))
        assert frame.ByteSize() < 512 * 1024
        assert sum(1 + len(item.top) for item in part.logprobs) <= LOGPROBS_PER_FRAME
        seen += [item.drawn.token_id for item in part.logprobs]
    assert seen == list(range(40_000))
    assert list(prompt_logprob_frames(7, [])) == []
