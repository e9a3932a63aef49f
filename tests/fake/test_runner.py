"""The fake runner: its ids depend on the tokens before them and on nothing else, and its steps take what they cost."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.engine import Engine, StepReport
from worker.engine.plan import Chunk, Draw, SamplingParams, StepPlan
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.fake import FakeRunner, StepCost, continuation

VOCAB = 500


def run(requests: list[Request], *, blocks: int = 64, step_tokens: int = 16) -> dict[tuple[int, int], list[int]]:
    """What an engine over a fake runner generates, by key and choice."""
    engine = Engine(
        FakeRunner(blocks, 4, VOCAB),
        SchedulerLimits(step_tokens, 8),
        max_waiting=100,
        clock=time.monotonic,
        deliver=lambda report: None,
        fault=lambda keys: None,
    )
    for request in requests:
        engine.submit(request)
    got: dict[tuple[int, int], list[int]] = {}

    def take(report: StepReport) -> None:
        for sequence in report.sequences:
            assert isinstance(sequence.key, int)
            got.setdefault((sequence.key, sequence.choice), []).append(sequence.drawn.token_id)

    while (report := engine.step()) is not None:
        take(report)
    return got


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


@settings(deadline=None, max_examples=40)
@given(st.lists(prompts, min_size=1, max_size=6), st.integers(4, 24), st.booleans())
def test_ids_are_a_function_of_prompt_seed_and_choice(
    prompts: list[list[int]], step_tokens: int, begins_alike: bool
) -> None:
    """Whatever shares their steps, their blocks and their cached prefixes, and wherever they were before."""
    if begins_alike:
        prompts = [prompts[0] + prompt for prompt in prompts]
    expected: dict[tuple[int, int], list[int]] = {}
    requests = []
    for key, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=key % 2, seed=key * 7919)
        whole = [continuation(prompt, 9, VOCAB, seed=sampling.seed * (key % 2), choice=choice) for choice in range(2)]
        moved = key % 3
        requests.append(
            Request(key, prompt, [ids[:moved] for ids in whole], sampling, max_tokens=9, prefix_root=bytes(16))
        )
        expected |= {(key, choice): ids[moved:] for choice, ids in enumerate(whole)}
    assert run(requests, step_tokens=step_tokens) == expected


def test_every_token_before_it_changes_an_id() -> None:
    base = continuation(range(50), 20, VOCAB)
    for position in range(50):
        changed = list(range(50))
        changed[position] += 100
        assert continuation(changed, 20, VOCAB) != base
    assert continuation(range(50), 20, VOCAB, seed=1) != base
    assert continuation(range(50), 20, VOCAB, choice=1) != base


def test_restricted_draws_heed_allowed_and_banned_ids() -> None:
    runner = FakeRunner(4, 4, VOCAB)

    def draw(params: SamplingParams, *banned: int) -> int:
        plan = StepPlan([Chunk([1, 2], 0, [0], [Draw(params, 0, 0, banned_ids=banned)])])
        return runner.execute(plan)[0][0].token_id

    free = draw(SamplingParams())
    assert draw(SamplingParams(), free) not in (free, -1)
    assert draw(SamplingParams(allowed_ids=(7, 8)), 7) == 8
    plan = StepPlan([Chunk([1], 0, [0], [Draw(SamplingParams(logprobs=1), 0, 0)])])
    (drawn,) = runner.execute(plan)[0]
    assert (drawn.logprob, drawn.top) == (0.0, ((drawn.token_id, 0.0),))


def test_what_was_never_computed_cannot_be_read() -> None:
    with pytest.raises(RuntimeError, match="position 3 was never computed"):
        FakeRunner(4, 4, VOCAB).execute(StepPlan([Chunk([1], 4, [0, 1])]))


def test_steps_take_at_least_what_they_cost() -> None:
    assert StepCost(0.01, 0.001).of(20) == pytest.approx(0.03)
    runner = FakeRunner(16, 4, VOCAB, StepCost(0.02, 0.001))
    started = time.monotonic()
    runner.execute(StepPlan([Chunk(list(range(30)), 0, list(range(8)))]))
    assert time.monotonic() - started >= 0.05


def test_a_fake_worker_needs_no_torch() -> None:
    code = "import sys, worker.fake.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
