"""The step loop on a runner that notices every wrong block: batching, chunks, caching, preemption, aborts, faults."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwire import prefix
from tests.helpers.fake_runner import FakeRunner, continuation
from worker.engine.block_contents import common
from worker.engine.engine import Engine, NeverFits, QueueFull, StepReport
from worker.engine.plan import Drawn, StepPlan
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import EndReason, Request

ROOT = prefix.root(b"model", "float32", 4, "", b"")


class Harness:
    """An engine that is stepped by hand."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_step_tokens: int = 32,
        max_running: int = 8,
        positions_ahead: int = 0,
    ) -> None:
        self.runner = FakeRunner(num_blocks, block_size)
        self.now = 0.0
        self.ids: dict[Hashable, list[int]] = {}
        self.ends: dict[Hashable, EndReason] = {}
        self.cached: dict[Hashable, int] = {}
        self.expired: list[Hashable] = []
        self.engine = Engine(
            self.runner,
            SchedulerLimits(max_step_tokens, max_running, positions_ahead=positions_ahead),
            max_waiting=100,
            clock=lambda: self.now,
            deliver=self.take,
            fault=lambda keys: None,
        )

    def submit(self, key: str, prompt: list[int], count: int, **more: object) -> None:
        self.engine.submit(Request(key, prompt, max_tokens=count, prefix_root=ROOT, **more))  # type: ignore[arg-type]

    def take(self, report: StepReport) -> None:
        for sequence in report.sequences:
            key = (sequence.key, sequence.choice) if sequence.choice else sequence.key
            ids = self.ids.setdefault(key, [])
            assert sequence.token_index == len(ids)
            ids.append(sequence.drawn.token_id)
            if sequence.start is not None:
                self.cached[key] = sequence.start.cached_tokens
            if sequence.end is not None:
                self.ends[key] = sequence.end
        self.expired += report.expired

    def step(self) -> bool:
        report = self.engine.step()
        if report is not None:
            self.take(report)
        self.engine.pool.check()
        return report is not None

    def run(self) -> None:
        for _ in range(10_000):
            if not self.step():
                return
        raise AssertionError("the engine does not come to an end")


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
