"""How often streams are written to while the router has more to do than it can.

A message costs what it costs, whatever it holds: 6,000 a second fill about half of a core, while the ids that they
carry cost next to nothing. So while the event loop falls behind, a stream waits up to `MOST_SECONDS` between two
writes, and what comes meanwhile goes out as one Delta. While it doesn't, every stream is written to at once.

Being behind shows in timers that are late; or in a thread that never rests, where work waits in gRPC and the loop takes
it bit by bit, with its timers in between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

MOST_SECONDS = 0.09
LEAST_SECONDS = 0.02
"""A shorter wait than this saves nothing worth having: it becomes none."""
LOOK_SECONDS = 0.05
BEHIND_SECONDS, BEHIND_SHARE = 0.015, 0.9
"""The loop is behind where a timer is as late as this, or its thread has run for so much of the time."""
ABREAST_SECONDS, ABREAST_SHARE = 0.005, 0.75
"""It isn't where neither is more than this. In between, the wait stays as it is."""
GROWTH, DECAY = 1.5, 0.95
SLICES = 16
"""Waits are looked at so many times in one of them, so that writes spread over it."""


class Turns(Protocol):
    """When a stream is written to."""

    def knock(self) -> None:
        """There is something to write: its turn comes now or soon."""
        ...

    def force(self) -> None:
        """There is something to write that isn't waited with."""
        ...


class Whole:
    """The turns of a stream that becomes one answer: nobody reads its messages one by one."""

    __slots__ = ("force",)

    def __init__(self, open_: Callable[[], None]) -> None:
        self.force = open_

    def knock(self) -> None:
        """What comes waits for the end."""


class Valve:
    """One stream's turn to be written to."""

    __slots__ = ("_flow", "_open", "_passed")

    def __init__(self, flow: Flow, open_: Callable[[], None]) -> None:
        self._flow = flow
        self._open = open_
        self._passed = 0.0
        """When the last turn was."""

    def knock(self) -> None:
        """There is something to write: its turn comes now or soon."""
        flow = self._flow
        if flow.interval and self._passed + flow.interval > (now := flow.clock()):
            flow.hold(self)
        else:
            self._passed = now if flow.interval else 0.0
            self._open()

    def force(self) -> None:
        """There is something to write that isn't waited with."""
        self._open()

    def pass_if_due(self, now: float) -> bool:
        """Takes its turn if it has come."""
        if self._passed + self._flow.interval > now:
            return False
        self._passed = now
        self._open()
        return True


class Flow:
    """The wait between two writes to a stream, by how far the event loop is behind. `run` keeps it up to date."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval = 0.0
        """In seconds."""
        self.clock = clock
        self._held: dict[Valve, None] = {}
        self._releasing: asyncio.TimerHandle | None = None

    def valve(self, open_: Callable[[], None]) -> Valve:
        """A stream's, which calls `open_` whenever the stream shall be written to."""
        return Valve(self, open_)

    async def run(self) -> None:
        """Follows the event loop, until cancelled."""
        while True:
            begun, ran = self.clock(), time.thread_time()
            await asyncio.sleep(LOOK_SECONDS)
            seconds = self.clock() - begun
            self.took(seconds - LOOK_SECONDS, (time.thread_time() - ran) / seconds)

    def took(self, late: float, busy: float) -> None:
        """Notes by how many seconds a timer was late, and for which share of the time the loop's thread ran."""
        if late >= BEHIND_SECONDS or busy >= BEHIND_SHARE:
            self.interval = min(MOST_SECONDS, max(LEAST_SECONDS, self.interval * GROWTH))
        elif late <= ABREAST_SECONDS and busy <= ABREAST_SHARE:
            self.interval *= DECAY
            if self.interval < LEAST_SECONDS:
                self.interval = 0.0

    def hold(self, valve: Valve) -> None:
        """Lets a stream wait for its turn."""
        self._held[valve] = None
        if self._releasing is None:
            self._release_later()

    def _release_later(self) -> None:
        delay = max(self.interval, LEAST_SECONDS) / SLICES
        self._releasing = asyncio.get_running_loop().call_later(delay, self._release)

    def _release(self) -> None:
        self._releasing = None
        now = self.clock()
        for valve in [valve for valve in self._held if valve.pass_if_due(now)]:
            del self._held[valve]
        if self._held:
            self._release_later()
