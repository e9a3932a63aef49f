"""How many ids to guess for a sequence: as many as are likely to save more time than they take.

A guess is computed beside what a step computes anyway, and kept only if it is what is drawn there: output is the same
whatever is decided here, only its speed isn't. So decisions may rest on measured times, which nothing else may.

Of a step with `batch` sequences that takes T seconds, an id is worth T / batch. One more row takes what steps of more
rows have shown that it does. The j-th guess in a row is kept with the j-th power of the rate at which those of its
sequence were kept lately. After guesses that all missed, a sequence rests, each time for twice as many steps: where
nothing repeats itself, next to nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from worker.engine.lookup import Lookup

MARGIN = 1.5
"""So many times what it costs a guess must be worth."""
LONGEST_REST = 32
"""Steps without a guess, at most, before a sequence is tried again."""
_KEPT_WEIGHT = 0.9
"""What each outcome leaves of the weight of those before it."""
_REST_WEIGHT = 0.99
_STEP_WEIGHT = 0.98
_ROW_SHARE = 0.05
"""What a row adds to a step, as a share of it, before anything is measured."""
_ROW_WEIGHT = 4.0
"""How much variance of the number of rows counts as much as that assumption."""
_OUTLIER = 2.0
"""Steps that take so many times what they should are taken for these: the machine did something else."""


class StepCost:
    """Seconds of steps that compute a row or a few for each sequence, as a line over the number of rows."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._square = self._product = 0.0

    def take(self, rows: int, seconds: float) -> None:
        if self._weight:
            seconds = min(seconds, _OUTLIER * self.seconds(rows))
        keep = _STEP_WEIGHT
        self._weight = keep * self._weight + 1
        self._rows = keep * self._rows + rows
        self._seconds = keep * self._seconds + seconds
        self._square = keep * self._square + rows * rows
        self._product = keep * self._product + rows * seconds

    def row(self) -> float:
        """Seconds that a row adds; at least 0."""
        if not self._weight:
            return 0.0
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._square - self._rows * rows
        assumed = _ROW_SHARE * seconds
        return max(0.0, (self._product - self._rows * seconds + _ROW_WEIGHT * assumed) / (variance + _ROW_WEIGHT))

    def seconds(self, rows: int) -> float:
        """Of a step of so many rows; 0 before the first."""
        if not self._weight:
            return 0.0
        mean = self._seconds / self._weight
        # Never far below what was seen: a line through noise may cross zero.
        return max(mean / 4, mean + self.row() * (rows - self._rows / self._weight))


class Guesses:
    """One sequence's: where they come from, and how they fared."""

    def __init__(self) -> None:
        self._lookup = Lookup()
        self._kept = self._missed = 0.0
        self._misses = 0
        """Guesses one after another that were wrong from the first id on."""
        self._rest = 0

    @property
    def rate(self) -> float:
        """The share of guessed ids that are kept."""
        return (self._kept + 1) / (self._kept + self._missed + 2)

    def make(self, tokens: Sequence[int], most: int, worth: float) -> list[int]:
        """Ids that may follow `tokens`, at most `most`; none where they aren't likely enough to pay.

        Args:
            worth: what an id saves, as a multiple of what guessing one costs.
        """
        if self._rest:
            self._rest -= 1
            return []
        count, chance = 0, self.rate
        likely = chance
        while count < most and likely * worth >= MARGIN:
            count += 1
            likely *= chance
        guess = self._lookup.guess(tokens, count) if count else []
        if not guess:
            self._kept *= _REST_WEIGHT
            self._missed *= _REST_WEIGHT
        return guess

    def take(self, guessed: int, kept: int) -> None:
        """Of `guessed` ids, so many were drawn."""
        for hit in [True] * kept + [False] * (kept < guessed):
            self._kept = _KEPT_WEIGHT * self._kept + hit
            self._missed = _KEPT_WEIGHT * self._missed + (not hit)
        self._misses = 0 if kept else self._misses + 1
        self._rest = min(2 ** max(self._misses - 1, 0) - 1, LONGEST_REST) if self._misses < 10 else LONGEST_REST


class Speculation:
    """Decides for all sequences of an engine, and counts.

    Args:
        most: ids guessed for a sequence in a step, at most; 0 guesses none.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.drafted = self.accepted = 0
        """Ids that were guessed, and those of them that were kept, since the engine was made."""
        self._cost = StepCost()

    def worth(self, batch: int) -> float:
        """What one more id saves where `batch` sequences decode, as a multiple of what guessing one costs."""
        row = self._cost.row()
        return self._cost.seconds(batch) / (batch * row) if row else 1 / (batch * _ROW_SHARE)

    def timed(self, rows: int, seconds: float) -> None:
        """Takes note of a step that computed no prompts."""
        self._cost.take(rows, seconds)

    def verified(self, guesses: Guesses, guessed: int, kept: int) -> None:
        """Takes note of how a sequence's guess fared."""
        guesses.take(guessed, kept)
        self.drafted += guessed
        self.accepted += kept
