"""Constraints in the step loop, on a fake that says what it was told."""

from __future__ import annotations

from collections.abc import Sequence

from tests.engine.harness import Harness
from tests.helpers.fake_runner import continuation
from worker.engine.constraint import Standing, TokenMask
from worker.engine.plan import NO_TOKEN, Chunk, Drawn, StepPlan
from worker.engine.sequence import EndReason


class Mask:
    def bits(self) -> bytes:
        return b""


class Script:
    """Stands as its script says after each id; remembers all of them, and how often a new mask was wanted."""

    def __init__(self, standings: dict[int, Standing], ids: tuple[int, ...] = (), undrawn: Standing = Standing.STUCK):
        self.standings, self.ids, self.stuck = standings, ids, undrawn
        self.forks: list[Script] = []
        self._mask: TokenMask | None = None
        self.masks = 0

    def mask(self) -> TokenMask:
        if self._mask is None:
            self._mask = Mask()
            self.masks += 1
        return self._mask

    def masks_behind(self, ids: Sequence[int]) -> list[TokenMask]:
        return [Mask() for _ in ids]

    def advance(self, token: int) -> Standing:
        self.ids, self._mask = (*self.ids, token), None
        return self.standings.get(len(self.ids), Standing.OPEN)

    def undrawn(self) -> Standing:
        return self.stuck

    def fork(self) -> Script:
        self.forks.append(Script(self.standings, self.ids, self.stuck))
        return self.forks[-1]


def test_it_sees_every_id_and_ends_its_choice() -> None:
    harness = Harness()
    script = Script({5: Standing.COMPLETE})
    harness.submit("a", [1, 2, 3], 10, constraints=[script])
    harness.submit("b", [1, 2, 3], 5, constraints=[Script({5: Standing.STUCK})])
    harness.run()
    assert harness.ids["a"] == list(script.ids) == continuation([1, 2, 3], 5)
    assert script.masks == 5
    assert harness.ends == {"a": EndReason.CONSTRAINT, "b": EndReason.DEAD_END}


def test_choices_have_their_own() -> None:
    harness = Harness()
    script = Script({4: Standing.COMPLETE})
    harness.submit("a", [1, 2, 3], 10, choices=[(), (), ()], constraints=[script, script, script])
    harness.run()
    assert [fork.ids for fork in script.forks] == [tuple(continuation([1, 2, 3], 4, choice=c)) for c in (1, 2)]
    assert set(harness.ends.values()) == {EndReason.CONSTRAINT}


def test_preemption_keeps_it() -> None:
    harness = Harness(num_blocks=8)
    scripts = [Script({}) for _ in range(3)]
    for number, script in enumerate(scripts):
        harness.submit(str(number), [number] * 5, 12, constraints=[script])
    harness.run()
    assert harness.engine.scheduler.preemptions
    for number, script in enumerate(scripts):
        assert list(script.ids) == continuation([number] * 5, 12)
        assert script.masks == 12


def undrawn(harness: Harness, keys: set[int]) -> None:
    """Has the runner draw nothing for sequences that begin with these ids, once they have generated two."""
    execute = harness.runner.execute

    def begins_with_key(chunk: Chunk) -> bool:
        held = harness.runner.cache[chunk.block_table[0]][0]
        return held is not None and held[0] in keys

    def without(plan: StepPlan) -> list[list[Drawn]]:
        drawn = execute(plan)
        return [
            [Drawn(NO_TOKEN)] * len(chunk.draws)
            if chunk.draws and chunk.draws[0].position == 2 and begins_with_key(chunk)
            else tokens
            for chunk, tokens in zip(plan.chunks, drawn, strict=True)
        ]

    harness.runner.execute = without  # type: ignore[method-assign]


def test_without_an_id_to_draw_a_choice_ends() -> None:
    harness = Harness()
    undrawn(harness, {1, 2, 3})
    harness.submit("met", [1, 1], 10, constraints=[Script({}, undrawn=Standing.COMPLETE)])
    harness.submit("stuck", [2, 2], 10, constraints=[Script({})])
    harness.submit("banned", [3, 3], 10)
    harness.submit("other", [4, 4], 10)
    ended: list[int] = []
    while (report := harness.engine.step()) is not None:
        for sequence in [s for s in report.sequences if s.drawn.token_id == NO_TOKEN]:
            assert sequence.end is not None
            harness.ends[sequence.key] = sequence.end
            ended.append(sequence.token_index)
            report.sequences.remove(sequence)
        harness.take(report)
    assert ended == [2, 2, 2]
    ends = [harness.ends[key] for key in ("met", "stuck", "banned", "other")]
    assert ends == [EndReason.CONSTRAINT, EndReason.DEAD_END, EndReason.DEAD_END, EndReason.LENGTH]
    assert harness.ids["other"] == continuation([4, 4], 10)
    assert harness.engine.pool.num_used == 0


def test_one_that_fails_takes_its_request_along_and_no_other() -> None:
    harness = Harness()
    harness.submit("a", [1, 2], 10, choices=[(), ()], constraints=[Script({3: Standing.FAILED})] * 2)
    harness.submit("b", [3, 4], 10)
    failed = []
    while (report := harness.engine.step()) is not None:
        harness.take(report)
        failed += report.too_complex
    assert failed == ["a"]
    assert len(harness.ids["a"]) == 2 and "a" not in harness.ends
    assert harness.ids["b"] == continuation([3, 4], 10)
    assert harness.engine.pool.num_used == 0
