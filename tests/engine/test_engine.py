"""The step loop on a runner that notices every wrong block: batching, chunks, preemption, aborts, faults."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.harness import ROOT, Harness
from tests.helpers.fake_runner import FakeRunner, continuation
from worker.engine.engine import Engine, NeverFits, QueueFull, StepReport
from worker.engine.plan import Drawn, StepPlan
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import EndReason, Request


def test_one_request() -> None:
    harness = Harness()
    harness.submit("a", [1, 2, 3], 10)
    harness.run()
    assert harness.ids["a"] == continuation([1, 2, 3], 10)
    assert harness.ends["a"] is EndReason.LENGTH
    assert harness.engine.pool.num_used == 0


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=12),
    count=st.integers(1, 12),
    num_blocks=st.integers(13, 40),
    max_step_tokens=st.integers(1, 64),
    max_running=st.integers(1, 8),
    gaps=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    use_cache=st.booleans(),
    block_size=st.sampled_from([4, 8, 16]),
)
def test_any_life_gives_the_tokens_of_running_alone(
    prompts: list[list[int]],
    count: int,
    num_blocks: int,
    max_step_tokens: int,
    max_running: int,
    gaps: list[int],
    use_cache: bool,
    block_size: int,
) -> None:
    harness = Harness(
        num_blocks=num_blocks, block_size=block_size, max_step_tokens=max_step_tokens, max_running=max_running
    )
    for number, prompt in enumerate(prompts):
        harness.submit(str(number), prompt, count, use_prefix_cache=use_cache)
        for _ in range(gaps[number]):
            harness.step()
    harness.run()
    assert harness.ids == {str(number): continuation(prompt, count) for number, prompt in enumerate(prompts)}
    assert harness.engine.pool.num_used == 0


def test_out_of_blocks_the_newest_is_preempted_and_nothing_changes() -> None:
    harness = Harness(num_blocks=10, max_step_tokens=100)
    prompts = [[number] * 9 for number in range(4)]
    for number, prompt in enumerate(prompts):
        harness.submit(str(number), prompt, 20)
    harness.run()
    assert harness.engine.scheduler.preemptions > 0
    assert harness.ids == {str(number): continuation(prompt, 20) for number, prompt in enumerate(prompts)}


def test_a_runner_that_computes_ahead_has_the_blocks_for_it_where_there_are_some() -> None:
    """And takes none from others: with few blocks, the same sequences are preempted as without."""
    seen = {}
    for ahead in (0, 1):
        roomy, tight = (Harness(num_blocks=count, positions_ahead=ahead) for count in (64, 9))
        tables: list[int] = []
        for harness in (roomy, tight):
            for number in range(3):
                harness.submit(f"r{number}", [number] * 6, 14)
        execute = roomy.runner.execute

        def watched(
            plan: StepPlan,
            execute: Callable[[StepPlan], list[list[Drawn]]] = execute,
            tables: list[int] = tables,
        ) -> list[list[Drawn]]:
            tables += [4 * len(chunk.block_table) - chunk.start - len(chunk.token_ids) for chunk in plan.chunks]
            return execute(plan)

        roomy.runner.execute = watched  # type: ignore[method-assign]
        roomy.run()
        tight.run()
        assert roomy.ids == tight.ids
        assert min(tables) == ahead
        seen[ahead] = (roomy.ids, tight.engine.scheduler.preemptions)
    assert seen[0] == seen[1] and seen[0][1] > 0


def test_a_step_stays_within_its_budget_and_decodes_come_first() -> None:
    harness = Harness(max_step_tokens=8)
    harness.submit("short", [1, 2], 30)
    harness.step()
    harness.submit("long", list(range(40)), 2)
    before = len(harness.ids["short"])
    for _ in range(5):
        harness.step()
    assert len(harness.ids["short"]) == before + 5, "a long prompt must not hold up a sequence that decodes"
    assert all(plan.num_tokens <= 8 for plan in harness.runner.steps)
    harness.run()
    assert harness.ids["long"] == continuation(list(range(40)), 2)


def test_a_long_prompt_admitted_first_does_not_starve_the_one_behind_it() -> None:
    harness = Harness(max_step_tokens=8)
    harness.submit("long", list(range(100)), 1)
    harness.step()
    harness.submit("other", [7], 5)
    harness.run()
    finished = list(harness.ends)
    assert finished == ["long", "other"] or finished == ["other", "long"]
    harness = Harness(max_step_tokens=8)
    harness.submit("decoding", [7], 50)
    harness.step()
    harness.submit("long", list(range(100)), 1)
    steps = 0
    while "decoding" not in harness.ends:
        harness.step()
        steps += 1
    assert steps <= 49


def test_stop_tokens_and_eos() -> None:
    harness = Harness()
    expected = continuation([5], 8)
    harness.submit("eos", [5], 20, eos_ids=frozenset({expected[3]}))
    harness.submit("stop", [5], 20, stop_ids=frozenset({expected[2]}))
    harness.run()
    assert (harness.ids["eos"], harness.ends["eos"]) == (expected[:4], EndReason.EOS)
    assert (harness.ids["stop"], harness.ends["stop"]) == (expected[:3], EndReason.STOP_TOKEN)


def test_earlier_ids_count() -> None:
    runner = FakeRunner(16, 4)
    reports: list[StepReport] = []
    engine = Engine(
        runner, SchedulerLimits(), max_waiting=1, clock=lambda: 0.0, deliver=reports.append, fault=lambda keys: None
    )
    expected = continuation([5], 8)
    engine.submit(Request("moved", [5], choices=[expected[:6]], max_tokens=8, prefix_root=ROOT))
    while (report := engine.step()) is not None:
        reports.append(report)
    assert [sequence.token_index for report in reports for sequence in report.sequences] == [6, 7]
    assert [sequence.drawn.token_id for report in reports for sequence in report.sequences] == expected[6:]


def test_of_suspects_a_step_computes_one_until_it_yields_a_token() -> None:
    harness = Harness(max_step_tokens=6)
    harness.submit("plain", [9], 12)
    for number in range(3):
        harness.submit(f"suspect {number}", [number] * 10, 6, suspect=True, choices=((), ()))
    harness.run()
    proven: set[int] = set()
    for plan in harness.runner.steps:
        prompts = {chunk.token_ids[0] for chunk in plan.chunks if chunk.start < 10 and chunk.token_ids[0] < 3}
        assert len(prompts - proven) <= 1
        proven |= {chunk.token_ids[0] for chunk in plan.chunks if chunk.draws and chunk.start < 10}
    assert len(harness.ends) == 7


def test_how_long_a_step_should_take() -> None:
    times = iter([0.0, 0.0, 2.0, 5.0, 5.0, 6.0, 9.0, 9.0, 9.0])
    seen: list[float] = []

    class Timed(FakeRunner):
        def execute(self, plan: StepPlan) -> list[list[Drawn]]:
            seen.append(engine.predicted_seconds())
            assert engine.executing() == ["a"]
            return super().execute(plan)

    engine = Engine(
        Timed(64, 4),
        SchedulerLimits(max_step_tokens=64),
        max_waiting=1,
        clock=lambda: next(times, 9.0),
        deliver=lambda report: None,
        fault=lambda keys: None,
    )
    engine.submit(Request("a", [1] * 128, max_tokens=1, prefix_root=ROOT))
    while engine.step() is not None:
        pass
    assert seen[0] == float("inf")
    assert 0 < seen[1] < float("inf")
    assert (engine.predicted_seconds(), engine.executing()) == (0.0, [])


def test_an_aborted_request_takes_all_its_choices_along() -> None:
    harness = Harness(max_running=2)
    harness.submit("a", list(range(10)), 50, choices=((),) * 4)
    for _ in range(3):
        harness.step()
    harness.engine.abort(["a"])
    harness.step()
    assert harness.engine.pool.num_used == 0
    assert not harness.step()


def test_what_is_drawn_is_told_what_it_may_not_be() -> None:
    harness = Harness()
    expected = continuation([5], 4)
    harness.submit(
        "a",
        [5],
        4,
        eos_ids=frozenset({700}),
        stop_ids=frozenset({600}),
        min_tokens=2,
        bad_words=[[9], [expected[0], 77], [5, 88], [expected[0], expected[1], 66]],
    )
    harness.run()
    banned = [chunk.draws[0].banned_ids for plan in harness.runner.steps for chunk in plan.chunks]
    assert banned == [[600, 700, 9], [600, 700, 9, 77], [9, 66], [9]], "prompts don't count as said"


def test_abort_frees_blocks_within_a_step() -> None:
    harness = Harness(max_step_tokens=8)
    harness.submit("running", [1, 2, 3], 50)
    harness.submit("prefilling", list(range(60)), 5)
    harness.submit("waiting", [1], 5)
    harness.step()
    harness.engine.abort(["running", "prefilling", "waiting", "never seen"])
    assert harness.step()
    assert harness.engine.pool.num_used == 0
    assert harness.engine.load.blocks_in_use == 0
    assert not harness.step()


def test_deadlines() -> None:
    harness = Harness(max_running=1)
    harness.submit("decoding", [1], 50, deadline=5.0)
    harness.submit("queued", [2], 1, deadline=6.0)
    harness.step()
    harness.now = 5.0
    harness.step()
    assert harness.expired == ["decoding"]
    harness.submit("late", [3], 1, deadline=4.0)
    computed = harness.runner.tokens_computed
    harness.now = 7.0
    harness.run()
    assert set(harness.expired) == {"decoding", "late"}
    assert harness.ids["queued"] == continuation([2], 1)
    assert harness.runner.tokens_computed <= computed + 1


def test_limits() -> None:
    harness = Harness(num_blocks=4)
    with pytest.raises(NeverFits):
        harness.submit("too large", [1] * 10, 7)
    for number in range(108):  # 8 that run and 100 that wait
        harness.submit(str(number), [number], 1)
    with pytest.raises(QueueFull):
        harness.submit("one more", [1], 1)
    harness.run()
    assert len(harness.ends) == 108


def test_the_loop_in_its_thread() -> None:
    runner = FakeRunner(64, 4)
    done = threading.Event()
    ids: list[int] = []

    def deliver(report: StepReport) -> None:
        for sequence in report.sequences:
            ids.append(sequence.drawn.token_id)
            if sequence.end is not None:
                done.set()

    engine = Engine(
        runner, SchedulerLimits(), max_waiting=4, clock=lambda: 0.0, deliver=deliver, fault=lambda keys: None
    )
    engine.start()
    engine.submit(Request("a", [1, 2], max_tokens=20, prefix_root=ROOT))
    assert done.wait(10)
    engine.stop()
    assert ids == continuation([1, 2], 20)


def test_a_step_that_raises_names_its_requests() -> None:
    class Broken(FakeRunner):
        def execute(self, plan: StepPlan) -> list[list[Drawn]]:
            raise RuntimeError("boom")

    faults: list[list[Hashable]] = []
    told = threading.Event()

    def fault(keys: list[Hashable]) -> None:
        faults.append(keys)
        told.set()

    engine = Engine(
        Broken(64, 4), SchedulerLimits(), max_waiting=4, clock=lambda: 0.0, deliver=lambda report: None, fault=fault
    )
    engine.submit(Request("a", [1], max_tokens=2, prefix_root=ROOT))
    engine.submit(Request("b", [1], max_tokens=2, prefix_root=ROOT))
    engine.start()
    assert told.wait(10)
    engine.stop()
    assert faults == [["a", "b"]]
