"""Guessed ids: whatever is guessed, and whenever, what comes out is what comes out without."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwire import prefix
from tests.helpers.fake_runner import FakeRunner
from worker.engine.constraint import Standing, TokenMask
from worker.engine.engine import Engine
from worker.engine.lookup import CANDIDATES, LONGEST_MATCH, PER_STEP, Lookup
from worker.engine.plan import Drawn, SamplingParams, StepPlan
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import EndReason, Request
from worker.engine.speculation import LONGEST_REST, Guesses, Speculation, StepCost

ROOT = prefix.root(b"model", "float32", 4, "", b"")
PENALIZED = SamplingParams(frequency_penalty=0.5, logprobs=0)
ALWAYS = 1e9


class Checked(FakeRunner):
    """Also looks at how it is asked to draw; remembers what is banned where."""

    def __init__(self, num_blocks: int, **more: Any) -> None:
        super().__init__(num_blocks, 4, **more)
        self.banned: dict[tuple[int, int], Sequence[int]] = {}
        """By first id of the sequence and position; what is drawn last at a position counts."""
        self.rows = 0

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        drawn = super().execute(plan)
        for chunk in plan.chunks:
            end = chunk.start + len(chunk.token_ids)
            tokens, _ = self._read(chunk.block_table, end)
            for index, draw in enumerate(chunk.draws if chunk.drafts else chunk.draws[:1]):
                self.rows += 1
                before = tokens[: end - chunk.drafts + index]
                if draw.params.penalized:
                    assert [*draw.prompt_ids, *draw.generated_ids] == before
                    assert draw.position == len(draw.generated_ids)
                self.banned[before[0], draw.position] = draw.banned_ids
        return drawn


class Run:
    """An engine that is stepped by hand."""

    def __init__(self, drafts: int, *, num_blocks: int = 64, max_step_tokens: int = 32, **more: Any) -> None:
        self.runner = Checked(num_blocks, **more)
        self.ids: dict[object, list[int]] = {}
        self.ends: dict[object, EndReason] = {}
        self.steps = 0
        self.engine = Engine(
            self.runner,
            SchedulerLimits(max_step_tokens, 6, max_draft_tokens=drafts),
            max_waiting=100,
            clock=lambda: 0.0,
            deliver=lambda report: None,
            fault=lambda keys: None,
        )

    def submit(self, key: str, prompt: list[int], count: int, **more: Any) -> None:
        self.engine.submit(Request(key, prompt, max_tokens=count, prefix_root=ROOT, **more))

    def step(self) -> bool:
        if (report := self.engine.step()) is None:
            return False
        self.steps += 1
        assert self.runner.steps[-1].num_tokens <= self.engine.scheduler.limits.max_step_tokens
        for sequence in report.sequences:
            ids = self.ids.setdefault((sequence.key, sequence.choice), [])
            assert (sequence.key, sequence.choice) not in self.ends
            assert sequence.token_index == len(ids)
            ids.append(sequence.drawn.token_id)
            if sequence.end is not None:
                self.ends[sequence.key, sequence.choice] = sequence.end
        self.engine.pool.check()
        return True

    def finish(self) -> Run:
        while self.step():
            pass
        assert self.engine.pool.num_used == 0
        return self

    @property
    def counts(self) -> tuple[int, int]:
        return self.engine.load.drafted_tokens, self.engine.load.accepted_tokens


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=8),
    count=st.integers(1, 24),
    choices=st.integers(1, 3),
    memory=st.sampled_from([1, 2, 3, None]),
    drafts=st.integers(1, 9),
    num_blocks=st.integers(14, 40),
    max_step_tokens=st.integers(1, 40),
    stops=st.frozensets(st.integers(0, 4), max_size=2),
    min_tokens=st.integers(0, 6),
    gaps=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    use_cache=st.booleans(),
    penalized=st.booleans(),
)
def test_any_life_gives_the_tokens_of_running_without(
    prompts: list[list[int]],
    count: int,
    choices: int,
    memory: int | None,
    drafts: int,
    num_blocks: int,
    max_step_tokens: int,
    stops: frozenset[int],
    min_tokens: int,
    gaps: list[int],
    use_cache: bool,
    penalized: bool,
) -> None:
    def request(run: Run, number: int) -> None:
        run.submit(
            str(number),
            prompts[number],
            count,
            choices=[()] * choices,
            sampling=PENALIZED if penalized else SamplingParams(),
            stop_ids=stops,
            min_tokens=min(min_tokens, count),
            use_prefix_cache=use_cache,
        )

    alone = Run(0, num_blocks=200, vocab_size=5, memory=memory)
    for number in range(len(prompts)):
        request(alone, number)
        alone.finish()
    crowded = Run(drafts, num_blocks=num_blocks, max_step_tokens=max_step_tokens, vocab_size=5, memory=memory)
    for number in range(len(prompts)):
        request(crowded, number)
        for _ in range(gaps[number]):
            crowded.step()
    crowded.finish()
    assert crowded.ids == alone.ids
    assert crowded.ends == alone.ends


def test_what_repeats_itself_takes_fewer_steps() -> None:
    plain, guessed = (Run(drafts, memory=1, vocab_size=20) for drafts in (0, 8))
    for run in (plain, guessed):
        run.submit("a", [1, 2, 3], 150)
        run.finish()
    assert guessed.ids == plain.ids
    assert guessed.steps < plain.steps / 4
    drafted, accepted = guessed.counts
    assert drafted >= accepted > 100
    assert plain.counts == (0, 0)


def test_where_nothing_repeats_itself_little_is_guessed() -> None:
    class Liar(Checked):
        """Never says what came before behind the last two."""

        def next_token(self, tokens: Sequence[int], choice: int) -> int:
            said = {after for first, after in pairwise(tokens) if first == tokens[-1]}
            return next(token for token in range(self.vocab_size) if token not in said)

    run = Run(8)
    run.runner = run.engine._runner = Liar(64, vocab_size=300)
    prompt = [token for first in range(12) for token in (first % 4, 5)] * 2
    run.submit("a", prompt, 120)
    run.finish()
    drafted, accepted = run.counts
    assert accepted == 0
    assert drafted <= 120 / LONGEST_REST + 16


def test_a_prompt_that_is_computed_leaves_no_room_and_blocks_are_never_taken_from_others() -> None:
    run = Run(8, memory=1, vocab_size=20, num_blocks=18)
    run.submit("a", [1, 2, 3], 40)
    for _ in range(5):
        run.step()
    run.submit("b", list(range(30, 50)), 8)
    while run.step():
        plan = run.runner.steps[-1]
        if any(len(chunk.token_ids) > 1 + chunk.drafts for chunk in plan.chunks):
            assert not any(chunk.drafts for chunk in plan.chunks)
    assert run.engine.scheduler.preemptions == 0


def test_bans_hold_behind_guesses() -> None:
    """min_tokens and bad words at each guessed position are those that a step of its own would have."""
    runs = [Run(drafts, memory=1, vocab_size=12) for drafts in (0, 6)]
    for run in runs:
        run.submit("a", [1, 2, 3], 60, min_tokens=33, stop_ids=frozenset({100}), bad_words=[[5, 6], [7], [1, 1, 1, 9]])
        run.submit("b", [2, 2, 3], 60, bad_words=[[token, 99] for token in range(12)])
        run.finish()
    plain, guessed = runs
    assert guessed.counts[1] > 20
    assert guessed.ids == plain.ids
    assert {key: guessed.runner.banned[key] for key in plain.runner.banned} == plain.runner.banned


class Behind:
    """A mask that says which ids it is behind."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids

    def bits(self) -> bytes:
        return b""


class Recorded:
    """A constraint that is met after `most` ids."""

    def __init__(self, most: int, ids: tuple[int, ...] = ()) -> None:
        self.most, self.ids = most, ids

    def mask(self) -> TokenMask:
        return Behind(self.ids)

    def masks_behind(self, ids: Sequence[int]) -> list[TokenMask]:
        return [Behind((*self.ids, *ids[: count + 1])) for count in range(len(ids))]

    def advance(self, token: int) -> Standing:
        self.ids = (*self.ids, token)
        return Standing.COMPLETE if len(self.ids) == self.most else Standing.OPEN

    def undrawn(self) -> Standing:
        return Standing.STUCK

    def fork(self) -> Recorded:
        return Recorded(self.most, self.ids)


def test_constraints_see_every_id_and_masks_are_those_of_their_positions() -> None:
    run = Run(6, memory=1, vocab_size=12)
    state = Recorded(37)
    run.submit("a", [1, 2, 3], 60, constraints=[state])
    run.finish()
    assert run.counts[1] > 10
    assert list(state.ids) == run.ids["a", 0]
    assert run.ends["a", 0] is EndReason.CONSTRAINT
    for plan in run.runner.steps:
        for chunk in plan.chunks:
            for index, draw in enumerate(chunk.draws):
                assert isinstance(draw.mask, Behind)
                assert len(draw.mask.ids) == draw.position
                if index:
                    assert list(draw.mask.ids[-index:]) == list(chunk.token_ids[-chunk.drafts :][:index])


def places(tokens: list[int]) -> list[tuple[int, int]]:
    """(ids that agree, place) of the newest earlier places behind which the last two ids come."""
    last, found = len(tokens) - 1, []
    for place in range(last - 1, 0, -1):
        length = 0
        while length < LONGEST_MATCH and length <= place and tokens[place - length] == tokens[last - length]:
            length += 1
        if length >= 2:
            found.append((length, place))
    return found[:CANDIDATES]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60), st.lists(st.integers(1, 30), max_size=8), st.integers(1, 20))
def test_a_guess_goes_on_from_the_longest_match(tokens: list[int], cuts: list[int], count: int) -> None:
    lookup = Lookup()
    for cut in sorted(cuts):
        if cut < len(tokens):
            lookup.guess(tokens[:cut], 3)
    guess = lookup.guess(tokens, count)
    found = places(tokens)
    if not found:
        assert guess == []
        return
    length, place = max(found)
    assert length == max(length for length, _ in found)
    period = len(tokens) - 1 - place
    expected = list(tokens)
    for _ in range(count):
        expected.append(expected[len(expected) - period])
    assert guess == expected[len(tokens) :]


def test_a_long_prompt_is_indexed_over_several_steps_and_found_as_one_that_grew() -> None:
    tokens = [(7 * index * index + index // 3) % 151_936 for index in range(PER_STEP + 900)]
    tokens[PER_STEP + 860 :] = tokens[100:140]
    grown, whole = Lookup(), Lookup()
    for count in range(PER_STEP, len(tokens)):
        grown.guess(tokens[:count], 4)
    assert whole.guess(tokens, 8) == []
    assert grown.guess(tokens, 8) == whole.guess(tokens, 8) == tokens[140:148]


def test_the_cost_of_a_row_is_learnt() -> None:
    cost = StepCost()
    assert (cost.row(), cost.seconds(5)) == (0.0, 0.0)
    for _ in range(100):
        for rows in (1, 9, 13):
            cost.take(rows, 0.020 + 0.001 * rows)
    assert cost.row() == pytest.approx(0.001, rel=0.05)
    assert cost.seconds(5) == pytest.approx(0.025, rel=0.05)
    cost.take(9, 5.0)  # somebody else had the machine
    assert cost.row() == pytest.approx(0.001, rel=0.5)


def test_what_a_guess_is_worth_falls_with_the_batch() -> None:
    speculation = Speculation(8)
    for _ in range(50):
        for rows in (1, 4, 16):
            speculation.timed(rows, 0.020 + 0.001 * rows)
    assert speculation.worth(1) > 5 * speculation.worth(8) > 0
    sure, unsure = Guesses(), Guesses()
    sure.take(8, 8)
    unsure.take(8, 1)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    assert sure.make(tokens, 6, ALWAYS) == [3, 4, 5, 6, 7, 8]
    assert len(sure.make(tokens, 6, 5.0)) > len(unsure.make(tokens, 6, 5.0)) > 0
    assert unsure.make(tokens, 6, 1.0) == []
