"""When a call that failed is made again, at which router, and how long after.

A stream that had begun goes on by `resume`, which nobody but a router's death makes necessary; everything else is sent
again whole, for a call that ended UNAVAILABLE gave nothing to its caller. With one router that is gRPC's own business,
by the published service config; with several, another is asked first. What a router refuses for a reason of its own
isn't asked again and again: each other router is asked once, and under overload all of them a few times more, as late
as they say.
"""

from __future__ import annotations

import itertools
import time

import grpc

from qwire.errors import QwireError, Reason

MAX_TRIES = 5
"""Failures in a row, with nothing new between them, after which a call is given up."""
MAX_REFUSED_TRIES = 3
"""The same for a call that overloaded routers refuse."""
DELAYS = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds before the next try by failures in a row. The first one at each other router is made at once."""


class Turns:
    """Where calls begin: at each router in turn. Safe to use from several threads."""

    def __init__(self, routers: int) -> None:
        self.routers = routers
        self._turns = itertools.count()

    def call(self, timeout: float | None) -> Tries:
        """A call that may take `timeout` seconds in all."""
        return Tries(self.routers, next(self._turns) % self.routers, timeout)


class Tries:
    """One call's.

    Attributes:
        router: index of the one to ask now.
        begun: a stream was accepted and can be resumed.
    """

    def __init__(self, routers: int, first: int, timeout: float | None) -> None:
        self.router = first
        self.begun = False
        self._routers = routers
        self._failures = 0
        self._deadline = None if timeout is None else time.monotonic() + timeout

    @property
    def timeout(self) -> float | None:
        """Seconds that are left of the time that the caller gave."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def progressed(self) -> None:
        """Something new has come."""
        self._failures = 0

    def after(self, error: QwireError) -> float | None:
        """Seconds to wait before the next try, which is `router`'s; None where there is to be none."""
        self._failures += 1
        if self._failures > self._limit(error):
            return None
        self.router = (self.router + 1) % self._routers
        delay = DELAYS[self._failures - 1]
        if self._failures < self._routers or error.reason == Reason.SLOW_READER:
            delay = 0.0
        elif error.retry_after is not None:
            delay = max(delay, error.retry_after)
        left = self.timeout
        return delay if left is None or delay < left else None

    def _limit(self, error: QwireError) -> int:
        """How many failures of this kind in a row are followed by another try."""
        code = error.code
        if self.begun:
            refused = code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after is not None
            return MAX_TRIES if code is grpc.StatusCode.UNAVAILABLE or refused or _is_slow(error) else 0
        if code is grpc.StatusCode.ALREADY_EXISTS and self._failures > 1:
            return MAX_TRIES  # the router has yet to notice that an earlier try is over
        if self._routers == 1:
            return 0  # gRPC has tried
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after is not None:
            return max(MAX_REFUSED_TRIES, self._routers - 1)
        if code is not grpc.StatusCode.UNAVAILABLE:
            return 0
        if error.reason and error.reason != Reason.DRAINING:
            return self._routers - 1
        return MAX_TRIES


def _is_slow(error: QwireError) -> bool:
    return error.reason == Reason.SLOW_READER
