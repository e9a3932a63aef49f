"""What sequences have of a prompt that others have computed, on a runner that notices every wrong block."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwire import prefix
from tests.engine.harness import Harness
from tests.helpers.fake_runner import continuation
from worker.engine.block_contents import common
from worker.engine.sequence import Request


def test_cached_prefix_is_not_computed_again() -> None:
    harness = Harness()
    shared = list(range(20))
    harness.submit("warm", [*shared, 1], 2)
    harness.run()
    computed = harness.runner.tokens_computed
    harness.submit("hit", [*shared, 2], 1)
    harness.run()
    assert harness.cached["hit"] == 20
    assert harness.runner.tokens_computed == computed + 1
    assert harness.ids["hit"] == continuation([*shared, 2], 1)


def test_generated_blocks_are_hit_by_the_next_turn() -> None:
    harness = Harness()
    harness.submit("turn 1", [1, 2, 3, 4, 5], 12)
    harness.run()
    history = [1, 2, 3, 4, 5, *harness.ids["turn 1"]]
    harness.submit("turn 2", [*history, 9, 9], 1)
    harness.run()
    assert harness.cached["turn 2"] == 16  # the full blocks of all that was computed: 5 + 11 tokens


def test_a_whole_prompt_in_the_cache_still_computes_its_last_token() -> None:
    harness = Harness()
    for key in ("first", "second"):
        harness.submit(key, list(range(8)), 3)
        harness.run()
    assert harness.cached["second"] == 7
    assert harness.ids["first"] == harness.ids["second"]


def test_one_computes_a_shared_prefix_and_the_others_wait_for_it() -> None:
    harness = Harness(num_blocks=200, max_step_tokens=512, max_running=16)
    shared = list(range(100))
    for number in range(16):
        harness.submit(str(number), [*shared, number], 2)
    harness.run()
    assert harness.runner.tokens_computed <= 100 + 16 * 3
    assert harness.ids == {str(number): continuation([*shared, number], 2) for number in range(16)}


@pytest.mark.parametrize("shared", [600, 520, 8], ids=["inside", "at a chunk's end", "in the first block"])
@pytest.mark.parametrize("count", [1, 2, 24])
def test_of_a_shared_prefix_that_ends_within_a_block_no_token_is_computed_twice(shared: int, count: int) -> None:
    harness = Harness(num_blocks=200, block_size=16, max_step_tokens=512, max_running=16)
    prompts = {str(number): [*range(shared), 1000 + number, 7, number] for number in range(16)}
    for key, prompt in prompts.items():
        harness.submit(key, prompt, count)
    harness.run()
    assert harness.ids == {key: continuation(prompt, count) for key, prompt in prompts.items()}
    assert harness.runner.tokens_computed == shared + 16 * (3 + count - 1)
    assert sorted(harness.cached.values()) == [0] + 15 * [shared]


def test_few_common_words_are_neither_waited_for_nor_copied() -> None:
    harness = Harness(block_size=16)
    for number in range(4):
        harness.submit(str(number), [1, 2, 3, 10 + number, 20 + number], 1)
    harness.run()
    assert len(harness.runner.steps) == 1
    harness.submit("later", [1, 2, 3, 30], 1)
    harness.run()
    assert set(harness.cached.values()) == {0}


def test_a_block_is_copied_from_whichever_agrees_longest() -> None:
    harness = Harness(block_size=8)
    shared = list(range(8))
    for number, tail in enumerate([[1, 2, 9], [1, 2, 3, 4, 9], [1, 2, 3, 5]]):
        harness.submit(str(number), [*shared, *tail], 1)
        harness.run()
    cases = {
        "between": ([1, 2, 3, 4, 5, 6], 12),
        "short": ([1, 2, 7], 10),
        "too short": ([1, 7], 8),
        "whole": ([1, 2, 3, 5], 11),
        "other": ([8], 8),
    }
    for key, (tail, cached) in cases.items():
        harness.submit(key, [*shared, *tail], 1)
        harness.run()
        assert harness.cached[key] == cached
        assert harness.ids[key] == continuation([*shared, *tail], 1)
    harness.submit("behind other tokens", [*range(1, 9), 1, 2, 3, 4, 9], 1)
    harness.run()
    assert harness.cached["behind other tokens"] == 0


def test_a_running_sequence_is_copied_from() -> None:
    harness = Harness(block_size=16)
    harness.submit("running", list(range(22)), 30)
    harness.step()
    harness.submit("hit", [*range(21), 99], 3)
    harness.run()
    assert harness.cached["hit"] == 21
    assert harness.ids["running"] == continuation(list(range(22)), 30)
    assert harness.ids["hit"] == continuation([*range(21), 99], 3)


def test_what_is_generated_in_an_unfinished_block_is_copied_by_the_next_turn() -> None:
    harness = Harness(block_size=16)
    harness.submit("turn 1", [1, 2, 3], 5)
    harness.run()
    history = [1, 2, 3, *harness.ids["turn 1"]]
    harness.submit("turn 2", [*history, 9, 9], 1)
    harness.run()
    assert harness.cached["turn 2"] == 7, "the last generated token was never computed"


def test_a_source_may_be_given_away_in_the_step_that_copies_it() -> None:
    harness = Harness(num_blocks=6, block_size=8)
    harness.submit("first", list(range(20)), 1)
    harness.run()
    # Takes over two blocks and needs four more: all that there are, the source among them.
    harness.submit("second", [*range(18), *range(50, 76)], 2)
    harness.run()
    assert harness.cached["second"] == 18
    assert harness.ids["second"] == continuation([*range(18), *range(50, 76)], 2)


def test_bypass_neither_reads_nor_leaves_anything() -> None:
    harness = Harness()
    harness.submit("bypass", list(range(20)), 1, use_prefix_cache=False)
    harness.run()
    assert harness.engine.pool.num_cached == 0
    harness.submit("plain", list(range(20)), 1)
    harness.run()
    harness.submit("bypass again", list(range(20)), 1, use_prefix_cache=False)
    harness.run()
    harness.submit("short bypass", [50, 51, 52], 1, use_prefix_cache=False)
    harness.run()
    harness.submit("short", [50, 51, 53], 1)
    harness.run()
    assert harness.cached == {"bypass": 0, "plain": 0, "bypass again": 0, "short bypass": 0, "short": 0}


def test_roots_keep_prefixes_apart() -> None:
    harness = Harness()
    harness.submit("one", list(range(20)), 1)
    harness.run()
    other = prefix.root(b"model", "float32", 4, "", b"another scope")
    harness.engine.submit(Request("two", list(range(20)), max_tokens=1, prefix_root=other))
    harness.run()
    assert harness.cached == {"one": 0, "two": 0}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_only_tokens_that_the_same_scope_has_computed_count_as_cached(data: st.DataObject) -> None:
    """Requests of two scopes, some of which bypass the cache, some with several choices, some aborted midway."""
    block_size = data.draw(st.sampled_from([2, 8, 16]))
    harness = Harness(
        num_blocks=data.draw(st.integers(48 // block_size + 1, 40)),
        block_size=block_size,
        max_step_tokens=data.draw(st.integers(1, 40)),
        max_running=data.draw(st.integers(1, 6)),
    )
    roots = [prefix.root(b"model", "float32", block_size, "", scope) for scope in (b"one", b"two")]
    requests: dict[str, Request] = {}
    aborted = set()
    for number in range(data.draw(st.integers(2, 10))):
        request = Request(
            str(number),
            data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=40)),
            choices=((),) * data.draw(st.integers(1, 3)),
            max_tokens=data.draw(st.integers(1, 6)),
            prefix_root=data.draw(st.sampled_from(roots)),
            use_prefix_cache=data.draw(st.integers(0, 4)) > 0,
        )
        harness.engine.submit(request)
        requests[str(number)] = request
        for _ in range(data.draw(st.integers(0, 3))):
            harness.step()
        if data.draw(st.integers(0, 3)) == 0:
            victim: str = data.draw(st.sampled_from(list(requests)))
            harness.engine.abort([victim])
            aborted.add(victim)
    harness.run()
    assert harness.engine.pool.num_used == 0
    texts: dict[tuple[str, int], list[int]] = {}
    for key, request in requests.items():
        for choice in range(len(request.choices)):
            expected = continuation(request.prompt_ids, request.max_tokens, choice=choice)
            ids = harness.ids.get((key, choice) if choice else key, [])
            assert ids == expected or (key in aborted and ids == expected[: len(ids)])
            texts[key, choice] = [*request.prompt_ids, *ids]
    for name, cached in harness.cached.items():
        request = requests[str(name)]
        others = [
            text
            for (other, _), text in texts.items()
            if other != name and requests[other].prefix_root == request.prefix_root and requests[other].use_prefix_cache
        ]
        most = max((common(text, request.prompt_ids) for text in others), default=0)
        assert cached <= min(most, len(request.prompt_ids) - 1) * request.use_prefix_cache
