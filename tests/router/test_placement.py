"""Placement policies, by themselves and on a trace of conversations."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwire import prefix
from router.placement import POLICIES, Candidate, Policy

BLOCK = 16


def candidate(index: int, *, streams: int = 0, pending: int = 0, cached: int = 0, capacity: int = 8) -> Candidate:
    return Candidate(index, streams, pending, capacity, cached)


def choose(policy: str, *candidates: Candidate, tokens: int = 600) -> int:
    return POLICIES[policy]().choose(candidates, tokens).index


def test_prefix_goes_where_the_prompt_is() -> None:
    assert choose("prefix", candidate(0), candidate(1, cached=592)) == 1
    assert choose("prefix", candidate(0), candidate(1, streams=3, cached=592)) == 1


def test_a_hot_prefix_spreads_when_waiting_costs_more() -> None:
    assert choose("prefix", candidate(0), candidate(1, pending=700, cached=592)) == 0
    assert choose("prefix", candidate(0), candidate(1, streams=20, cached=592, capacity=64)) == 0


def test_a_miss_goes_to_the_least_loaded() -> None:
    assert choose("prefix", candidate(0, streams=2), candidate(1, streams=1)) == 1
    assert choose("least-loaded", candidate(0, streams=2), candidate(1, pending=10, cached=592)) == 1


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5000), st.integers(0, 600)), min_size=2, max_size=6),
    st.sampled_from(["prefix", "least-loaded"]),
)
def test_nobody_queues_while_another_has_room(workers: list[tuple[int, int, int]], policy: str) -> None:
    candidates = [
        candidate(index, streams=streams, pending=pending, cached=cached)
        for index, (streams, pending, cached) in enumerate(workers)
    ]
    chosen = candidates[choose(policy, *candidates)]
    assert not chosen.queues or all(worker.queues for worker in candidates)


def cached_tokens_on_a_conversation_trace(policy: Policy) -> int:
    """Forty conversations of six turns each, in random order, on four workers with endless caches."""
    chance = random.Random(7)
    caches: list[set[bytes]] = [set() for _ in range(4)]
    histories = [[chance.randrange(1000) for _ in range(200)] for _ in range(40)]
    turns = [number for number in range(40) for _ in range(6)]
    chance.shuffle(turns)
    total = 0
    for number in turns:
        prompt = histories[number]
        hashes = prefix.block_hashes(bytes(16), prompt, BLOCK)
        held = [BLOCK * next((i for i, h in enumerate(hashes) if h not in cache), len(hashes)) for cache in caches]
        # Every turn is over before the next begins: what differs is only who holds what.
        chosen = policy.choose([candidate(index, cached=held[index]) for index in range(4)], len(prompt))
        total += held[chosen.index]
        caches[chosen.index].update(hashes)
        histories[number] = [*prompt, *(chance.randrange(1000) for _ in range(100))]
    return total


def test_prefix_finds_more_than_round_robin() -> None:
    found = {name: cached_tokens_on_a_conversation_trace(POLICIES[name]()) for name in POLICIES}
    assert found["prefix"] > 2 * found["round-robin"]


def test_round_robin_takes_turns() -> None:
    policy = POLICIES["round-robin"]()
    candidates = [candidate(0), candidate(1, streams=9), candidate(2)]
    assert [policy.choose(candidates, 1).index for _ in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_one_candidate_is_taken(name: str) -> None:
    assert choose(name, candidate(3, streams=99)) == 3
