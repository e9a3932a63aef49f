"""Several choices of one request, on a runner that notices every wrong block."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.harness import Harness
from tests.helpers.fake_runner import continuation
from worker.engine.engine import QueueFull


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 5)), min_size=1, max_size=5
    ),
    count=st.integers(1, 9),
    num_blocks=st.integers(8, 40),
    max_step_tokens=st.integers(1, 64),
    max_running=st.integers(1, 8),
    use_cache=st.booleans(),
)
def test_choices_give_what_each_gives_alone(
    requests: list[tuple[list[int], int]],
    count: int,
    num_blocks: int,
    max_step_tokens: int,
    max_running: int,
    use_cache: bool,
) -> None:
    harness = Harness(num_blocks=num_blocks, max_step_tokens=max_step_tokens, max_running=max_running)
    for number, (prompt, n) in enumerate(requests):
        harness.submit(str(number), prompt, count, choices=((),) * n, use_prefix_cache=use_cache)
    harness.run()
    expected = {
        (str(number), choice) if choice else str(number): continuation(prompt, count, choice=choice)
        for number, (prompt, n) in enumerate(requests)
        for choice in range(n)
    }
    assert harness.ids == expected
    assert harness.engine.pool.num_used == 0


@pytest.mark.parametrize("length", [8, 10])
@pytest.mark.parametrize("use_cache", [True, False])
def test_choices_compute_their_prompt_once(length: int, use_cache: bool) -> None:
    harness = Harness()
    harness.submit("a", list(range(length)), 1 + 5, choices=((),) * 4, use_prefix_cache=use_cache)
    harness.run()
    assert harness.runner.tokens_computed == length + 4 * 5
    copies = sum(len(plan.copies) for plan in harness.runner.steps)
    assert copies == (3 if length % 4 else 0), "full blocks are shared, the unfinished one is copied"


def test_choices_of_a_moved_request_go_on_where_each_stood() -> None:
    harness = Harness()
    whole = [continuation([5], 8, choice=choice) for choice in range(3)]
    harness.ids = {"a": whole[0][:3], ("a", 1): [], ("a", 2): whole[2][:7]}
    harness.submit("a", [5], 8, choices=[whole[0][:3], [], whole[2][:7]])
    harness.run()
    assert harness.ids == {"a": whole[0], ("a", 1): whole[1], ("a", 2): whole[2]}


def test_choices_that_ended_elsewhere_are_left_out_and_the_first_of_the_others_tells_how_it_began() -> None:
    harness = Harness()
    whole = [continuation([5], 8, choice=choice) for choice in range(3)]
    harness.ids = {("a", 1): whole[1][:3], ("a", 2): []}
    harness.submit("a", [5], 8, choices=[[], whole[1][:3], []], ended=frozenset({0}))
    harness.run()
    assert harness.ids == {("a", 1): whole[1], ("a", 2): whole[2]}
    assert harness.cached == {("a", 1): 0}


def test_a_request_that_moved_keeps_its_turn_and_its_place() -> None:
    harness = Harness(max_running=1)
    harness.now = 10.0
    for number in range(101):
        harness.submit(str(number), [number], 1)
    with pytest.raises(QueueFull):
        harness.submit("late", [1], 1)
    harness.submit("moved", [7], 1, moved=True, waited=5.0)
    harness.run()
    assert next(iter(harness.ends)) == "moved"
    assert len(harness.ends) == 102
