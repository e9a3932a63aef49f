"""Short forms of `benchmarks.sched`, whose long ones are commands."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sched import Arrival, live, outcome, policies, pool_operations, simulate, trace


@settings(max_examples=40, deadline=None)
@given(chance=st.randoms())
def test_any_life_of_a_scheduler_ends_with_its_books_in_order(chance: random.Random) -> None:
    live(chance)


def test_many_lives() -> None:
    assert sum(live(random.Random(seed)) for seed in range(100)) > 1000


def test_many_operations_of_a_pool() -> None:
    done = pool_operations(10_000, 1)
    assert min(done.values()) > 100


def test_policies_differ_on_a_trace_as_they_should() -> None:
    arrivals = trace(0.3, 60, 0)
    outcomes = {}
    for name, limits, become in policies():
        if "adaptive" in name or name == "fair, no target":
            progress = simulate([Arrival(a.at, become(a.request)) for a in arrivals], limits)
            assert all(len(p.times) == p.arrival.request.max_tokens for p in progress)
            for item, arrival in zip(progress, arrivals, strict=True):
                item.arrival = arrival
            outcomes[name] = outcome(name, progress)
    fair, untargeted = outcomes["fair, adaptive"], outcomes["fair, no target"]
    assert fair.interval_p99 < untargeted.interval_p99 / 3
    assert fair.quiet_first_token_p99 < outcomes["first come, adaptive"].quiet_first_token_p99
