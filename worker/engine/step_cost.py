"""How long a step takes, learned from those that were measured.

The model is linear: so much for any step, for each row that decodes, for each token of a prompt, and for each position
that a token attends to. A Kalman filter keeps the four numbers: it learns from any mix of steps, keeps what it knows of
what doesn't come up for a while, and follows a machine that others slow down. Plain arithmetic, some 10 µs a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from worker.engine.plan import Chunk

_NOISE = 0.1
"""Of a measured time, as a share of it."""
_DRIFT = 0.02
"""Of each number from a step to the next, as a share of it."""
_OUTLIER = 3.0
"""A step that takes so many times what is expected counts as one that takes this many times: something else ran."""
_USUAL = (1.0, 4.0, 64.0, 64.0)
"""Before anything is known, what as much of a feature may cost at most is all of the first step's time."""
_POSITION = 1e-3
"""What attended positions are counted in, so that the four numbers are of like size."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's time depends on."""

    rows: int = 0
    """Tokens of sequences that decode, guesses among them."""
    tokens: int = 0
    """Tokens of prompts."""
    attended: int = 0
    """Positions attended to, over all tokens."""

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> StepShape:
        rows = tokens = attended = 0
        for chunk in chunks:
            count = len(chunk.token_ids)
            if count == 1 + chunk.drafts:
                rows += 1
            else:
                tokens += count
            attended += attended_by(chunk.start, count)
        return cls(rows, tokens, attended)

    @property
    def _features(self) -> tuple[float, float, float, float]:
        return 1.0, float(self.rows), float(self.tokens), self.attended * _POSITION


class StepCost:
    """Predicts seconds of steps."""

    def __init__(self) -> None:
        self._numbers = [0.0] * 4
        """Seconds a step, a row, a token, and a thousand positions."""
        self._doubt: list[list[float]] = []
        """Covariance of the numbers; empty while nothing was measured."""

    @property
    def known(self) -> bool:
        return bool(self._doubt)

    def take(self, shape: StepShape, seconds: float) -> None:
        """Learns from a step."""
        features = shape._features
        if not self._doubt:
            self._doubt = [[0.0] * 4 for _ in range(4)]
            for index, (feature, usual) in enumerate(zip(features, _USUAL, strict=True)):
                self._doubt[index][index] = (seconds / max(feature, usual)) ** 2
        expected = self.seconds(shape)
        doubt = self._doubt
        for index, number in enumerate(self._numbers):
            doubt[index][index] += (_DRIFT * number) ** 2
        f0, f1, f2, f3 = features  # written out: this runs in every step
        spread = [a * f0 + b * f1 + c * f2 + d * f3 for a, b, c, d in doubt]
        s0, s1, s2, s3 = spread
        variance = s0 * f0 + s1 * f1 + s2 * f2 + s3 * f3 + (_NOISE * max(seconds, expected)) ** 2
        if variance <= 0:
            return  # a step that took no time, on a clock that stands
        # What is well known isn't given up for one step; what isn't may turn out to be anything.
        surprise = min(seconds - expected, max((_OUTLIER - 1) * expected, _OUTLIER * math.sqrt(variance)))
        gain = [value / variance for value in spread]
        self._shift(gain, surprise)
        self._doubt = doubt = [
            [a - g * s0, b - g * s1, c - g * s2, d - g * s3] for g, (a, b, c, d) in zip(gain, doubt, strict=True)
        ]
        # None is negative. One that would be is moved to 0, and the others with it as they are correlated, so that what
        # steps such as those before should take stays as it was.
        for index in range(4):
            if self._numbers[index] < 0:
                if (variance := doubt[index][index]) > 0:
                    self._shift([row[index] / variance for row in doubt], -self._numbers[index])
                self._numbers[index] = 0.0

    @property
    def _token(self) -> float:
        """Seconds that a token of a prompt adds: while that is in doubt, as many as it well may."""
        return max(self._numbers[2], math.sqrt(max(0.0, self._doubt[2][2]))) if self._doubt else 0.0

    def _shift(self, direction: Sequence[float], amount: float) -> None:
        self._numbers = [n + d * amount for n, d in zip(self._numbers, direction, strict=True)]

    def seconds(self, shape: StepShape) -> float:
        """What a step of that shape should take; 0 while nothing was measured."""
        fixed, row, token, thousand = self._numbers
        return fixed + row * shape.rows + token * shape.tokens + thousand * _POSITION * shape.attended

    def prompt_seconds(self, start: int, count: int) -> float:
        """What `count` tokens of a prompt from position `start` should add to a step."""
        return self._token * count + self._numbers[3] * _POSITION * attended_by(start, count)

    def prompt_tokens(self, start: int, seconds: float) -> int:
        """How many tokens of a prompt from position `start` a step can compute within so much more time; at least 0."""
        position = self._numbers[3] * _POSITION
        linear = self._token + position * (start + 0.5)
        if seconds <= 0:
            return 0
        # The root of position / 2 * n^2 + linear * n = seconds, in the form that doesn't cancel.
        divisor = linear + math.sqrt(linear * linear + 2 * position * seconds)
        return int(2 * seconds / divisor) if divisor > 0 else _UNBOUNDED


_UNBOUNDED = 1 << 30


def attended_by(start: int, count: int) -> int:
    """Positions that `count` tokens from position `start` attend to, over all of them."""
    return count * start + count * (count + 1) // 2
