"""Whose tokens a step computes: priorities, tenants, deadlines, preemption, and steps that keep to their time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwire.ordering import AGEING_SECONDS, MAX_PRIORITY
from tests.engine.harness import Harness
from tests.helpers.fake_runner import continuation
from worker.engine.plan import Drawn, StepPlan
from worker.engine.scheduler import DECODES_STRETCHED, LEAST_PROMPT_TOKENS
from worker.engine.step_cost import StepCost, StepShape, attended_by


class Paced(Harness):
    """An engine whose clock only its steps move, by what a machine would take for them."""

    def __init__(self, *, fixed: float = 0.05, row: float = 1e-3, token: float = 2e-3, **sizes: int) -> None:
        super().__init__(**sizes)
        self.cost = fixed, row, token
        self.seconds: list[float] = []
        """Of each step."""
        execute = self.runner.execute

        def timed(plan: StepPlan) -> list[list[Drawn]]:
            shape = StepShape.of(plan.chunks)
            self.seconds.append(self.cost[0] + self.cost[1] * shape.rows + self.cost[2] * shape.tokens)
            self.now += self.seconds[-1]
            return execute(plan)

        self.runner.execute = timed  # type: ignore[method-assign]

    def begun(self) -> list[object]:
        """Keys in the order of their first tokens."""
        return list(self.ids)


def test_the_order_of_waiting_requests_is_that_of_the_rule() -> None:
    harness = Paced(max_running=1)
    harness.submit("running", [1], 3)
    harness.step()
    harness.submit("low", [2], 1, priority=-1)
    harness.submit("late", [3], 1)
    harness.submit("due", [4], 1, deadline=50.0)
    harness.submit("due first", [5], 1, deadline=40.0)
    harness.submit("other tenant", [6], 1, tenant=b"other")
    harness.run()
    # The other tenant came with as much as the first had had by then, which went on to get more.
    assert harness.begun() == ["running", "other tenant", "due first", "due", "late", "low"]


def test_a_new_tenant_does_not_wait_behind_anothers_long_queue() -> None:
    harness = Paced(num_blocks=200, max_running=2)
    for number in range(20):
        harness.submit(f"flood {number}", [number] * 8, 4, tenant=b"flood")
    for _ in range(12):
        harness.step()
    before = len(harness.ids)
    for number in range(3):
        harness.submit(f"new {number}", [100 + number] * 8, 4, tenant=b"new")
    harness.run()
    order = harness.begun()[before:]
    assert [order.index(f"new {number}") <= 2 * number + 2 for number in range(3)] == [True] * 3


def test_a_new_tenants_short_prompt_goes_before_the_rest_of_a_long_one() -> None:
    harness = Paced(max_step_tokens=16, num_blocks=100)
    harness.submit("long", list(range(200)), 1, tenant=b"one")
    harness.step()
    harness.submit("short", [7] * 10, 1, tenant=b"two")
    harness.submit("own", [8] * 10, 1, tenant=b"one")
    harness.run()
    assert harness.begun() == ["short", "long", "own"]


def test_higher_priority_takes_the_place_of_lower_but_not_the_oldests() -> None:
    harness = Paced(max_running=3)
    for number in range(3):
        harness.submit(f"low {number}", [number] * 6, 12)
    harness.step()
    harness.submit("same", [7] * 6, 2)
    harness.step()
    assert harness.engine.scheduler.preemptions == 0
    for number in range(3):
        harness.submit(f"high {number}", [50 + number] * 6, 2, priority=1)
    harness.step()
    harness.step()
    running = {sequence.request.key for sequence in harness.engine.scheduler.running}
    assert "low 0" in running, "the oldest keeps its place"
    assert harness.engine.scheduler.preemptions == 2
    harness.run()
    assert harness.ids["low 2"] == continuation([2] * 6, 12)
    assert harness.begun().index("high 2") < harness.begun().index("same")


def test_higher_priority_takes_blocks_only_where_that_lets_it_start() -> None:
    harness = Paced(num_blocks=12, max_running=4)  # of 4 positions
    harness.submit("oldest", [1] * 16, 4)
    harness.submit("low", [2] * 16, 4)
    harness.step()
    harness.submit("too large beside the oldest", [3] * 30, 4, priority=5)
    harness.step()
    assert harness.engine.scheduler.preemptions == 0
    harness.run()
    harness = Paced(num_blocks=12, max_running=4)
    harness.submit("oldest", [1] * 16, 4)
    harness.submit("low", [2] * 16, 4)
    harness.step()
    harness.submit("fits", [3] * 18, 4, priority=5)
    harness.run()
    assert harness.engine.scheduler.preemptions == 1
    assert list(harness.ends) == ["oldest", "fits", "low"]


@pytest.mark.parametrize("priority", [-10, 0])
def test_what_is_low_starts_and_stays_under_a_flood_of_what_is_high(priority: int) -> None:
    harness = Paced(max_running=2, fixed=0.5, num_blocks=200)
    harness.submit("old", [1], 4, priority=MAX_PRIORITY)
    harness.step()
    harness.submit("low", [2] * 5, 5, priority=priority)
    submitted, number = harness.now, 0
    while "low" not in harness.ends:
        for _ in range(4 - len(harness.engine.scheduler.waiting)):
            harness.submit(f"high {number}", [3 + number] * 5, 6, priority=MAX_PRIORITY)
            number += 1
        assert harness.step()
        bound = (MAX_PRIORITY - priority + 1) * AGEING_SECONDS
        assert harness.now - submitted <= bound + 6 * 2 * 0.6 + 5 * 0.6  # then a place, and its own steps
    assert harness.ids["low"] == continuation([2] * 5, 5)


def test_beside_decodes_a_prompt_takes_chunks_of_the_target_and_alone_whole_ones() -> None:
    harness = Paced(num_blocks=4000, max_step_tokens=512, max_running=16)
    harness.submit("warm-up", list(range(900, 1700)), 2)
    harness.run()
    alone = harness.seconds[0]
    assert harness.runner.steps[0].num_tokens == 512
    for number in range(8):
        harness.submit(f"stream {number}", [number] * 20, 400)
    for _ in range(40):
        harness.step()
    decode = harness.seconds[-1]
    harness.submit("long", [(7 * i) % 997 for i in range(2000)], 2)
    first = len(harness.seconds)
    while "long" not in harness.ids:
        harness.step()
    disturbed = harness.seconds[first:]
    assert max(disturbed) <= 1.15 * DECODES_STRETCHED * decode < alone
    assert sum(disturbed) / len(disturbed) >= 0.85 * DECODES_STRETCHED * decode, "the target is made use of"
    assert len({len(plan.chunks) for plan in harness.runner.steps[first:]}) == 1, "no stream misses a step"
    harness.engine.abort(["long", *(f"stream {number}" for number in range(8))])
    harness.submit("alone", [(5 * i) % 997 for i in range(1100)], 2)
    harness.step()
    assert harness.runner.steps[-1].num_tokens == 512


def test_a_target_below_what_decodes_take_leaves_prompts_their_least() -> None:
    harness = Paced(num_blocks=4000, max_step_tokens=512)
    harness.engine.scheduler.limits = type(harness.engine.scheduler.limits)(512, 8, step_target=0.001)
    harness.submit("stream", [1], 100)
    for _ in range(5):
        harness.step()
    harness.submit("long", list(range(100)), 1)
    while "long" not in harness.ids:
        harness.step()
        assert harness.runner.steps[-1].num_tokens in (1 + LEAST_PROMPT_TOKENS, 1 + 100 % LEAST_PROMPT_TOKENS)


@settings(max_examples=40, deadline=None)
@given(
    fixed=st.floats(1e-4, 0.5),
    row=st.floats(0, 0.01),
    token=st.floats(1e-6, 0.01),
    thousand=st.floats(0, 1e-3),
    noise=st.lists(st.floats(0.9, 1.1), min_size=7, max_size=7),
    data=st.data(),
)
def test_the_cost_of_steps_is_learned_whatever_the_machine(
    fixed: float, row: float, token: float, thousand: float, noise: list[float], data: st.DataObject
) -> None:
    def true(shape: StepShape) -> float:
        return fixed + row * shape.rows + token * shape.tokens + thousand * shape.attended / 1000

    cost = StepCost()
    shapes = [StepShape(0, 512, attended_by(0, 512)), StepShape(0, 100, attended_by(512, 100)), StepShape(1, 0, 600)]
    shapes += [StepShape(rows, 0, rows * 500) for rows in (2, 4, 8, 8, 8)]
    for count in range(120):
        shape = shapes[count % len(shapes)]
        cost.take(shape, true(shape) * noise[count % 7])
    for shape in (*shapes, StepShape(8, 256, 8 * 500 + attended_by(256, 256))):
        assert 0.75 * true(shape) <= cost.seconds(shape) <= 1.3 * true(shape)
    start, seconds = data.draw(st.integers(0, 10_000)), data.draw(st.floats(0, 1))
    count = cost.prompt_tokens(start, seconds)
    if count < 1 << 20:
        slack = 1e-6 * seconds + 1e-12
        assert cost.prompt_seconds(start, count) <= seconds + slack
        assert cost.prompt_seconds(start, count + 1) >= seconds - slack


def test_one_step_that_others_held_up_changes_little() -> None:
    cost = StepCost()
    shape = StepShape(8, 0, 4000)
    for _ in range(50):
        cost.take(shape, 0.1)
    cost.take(shape, 60.0)
    assert cost.seconds(shape) < 0.2
    for _ in range(50):
        cost.take(shape, 0.3)  # a machine that others slow down for good
    assert 0.27 < cost.seconds(shape) < 0.33
