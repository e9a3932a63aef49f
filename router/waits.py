"""How long those who come now will wait, by what was measured of those before them."""

from __future__ import annotations

REMEMBERED = 32
"""Turns that a pace goes by, about: older ones fade."""


class Pace:
    """How far apart the turns of a queue are while something waits in it. Times are seconds on one monotonic clock."""

    def __init__(self) -> None:
        self._turns = 0.0
        self._seconds = 0.0
        self._since: float | None = None
        """The last turn, or when the queue filled after it; None while nothing waits."""

    def waits(self, now: float) -> None:
        """Something waits from now on, or did already."""
        if self._since is None:
            self._since = now

    def turn(self, now: float, *, more: bool) -> None:
        """What waited has got its turn.

        Args:
            more: whether anything still waits.
        """
        if self._since is None:
            return  # it has not waited
        fade = 1 - 1 / REMEMBERED
        self._turns = self._turns * fade + 1
        self._seconds = self._seconds * fade + now - self._since
        self._since = now if more else None

    def empty(self) -> None:
        """Nothing waits any more, without a turn."""
        self._since = None

    def seconds(self, now: float) -> float:
        """Between two turns; 0 while nothing was measured. A turn that is overdue counts as if it came now."""
        if not self._turns:
            return 0.0
        overdue = 0.0 if self._since is None else now - self._since
        return max(self._seconds / self._turns, (self._seconds + overdue) / (self._turns + 1))


class Share:
    """A moving average of parts of one."""

    def __init__(self, first: float) -> None:
        self.value = first

    def take(self, part: float) -> None:
        self.value += (part - self.value) / REMEMBERED
