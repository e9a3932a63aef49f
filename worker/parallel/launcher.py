"""The parent of a worker's ranks: forks them, watches them, and forks a fresh group when one is lost.

Importing torch takes seconds, so this process imports everything once and its children begin with that done. It must
therefore stay fit to fork: it runs no tensor operation, opens no channel and has no thread beside its own. (One that
read ahead while it imported has ended by then.)
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from worker.parallel.process import become_rank

log = logging.getLogger(__name__)

LOST = signal.SIGUSR1
"""Sent to rank 0 when another rank has died: it has `RankPolicy.fault_grace` seconds to end. Unhandled, it kills."""

_STOPS = frozenset({signal.SIGTERM, signal.SIGINT})
_WATCHED = _STOPS | {signal.SIGCHLD}


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank's process knows of its group."""

    rank: int
    """Of all processes, whatever stages they form."""
    meeting: Path
    """A file in memory that only this group's processes can open by this path."""
    remembered: str
    """What rank 0 of an earlier group noted down; empty in the first group."""
    note: int
    """File descriptor of the pipe to the launcher."""

    def remember(self, text: str) -> None:
        """From rank 0: the group is at work now; `text` is for rank 0 of the groups after it. Once a group."""
        os.write(self.note, text.encode())


@dataclass(frozen=True, slots=True)
class RankPolicy:
    """When a lost group is replaced. Times are in seconds."""

    first_delay: float = 0.1
    """Before the first new group; doubles with each one."""
    longest_delay: float = 2.0
    reset_after: float = 30.0
    """A group that lived this long starts over with `first_delay`."""
    start_attempts: int = 3
    """So many groups in a row that were lost before they were at work end the launcher."""
    fault_grace: float = 1.0
    """What rank 0 gets, after another rank died, to tell routers which requests were running."""
    stop_grace: float = 5.0
    """What the others get to end after rank 0 has ended well."""


def run_ranks(
    world: int, main: Callable[[Place], int], *, final: Collection[int], policy: RankPolicy | None = None
) -> int:
    """Runs `main` in `world` processes until rank 0 returns 0, and returns the launcher's exit status.

    A rank that ends in any other way takes its group with it, and a new group is forked. SIGTERM and SIGINT go to rank
    0, which ends the others. Ranks die with the launcher, however it dies.

    Args:
        main: gives a rank's exit status.
        final: statuses after which no new group is tried, since it would end alike.
    """
    policy = policy or RankPolicy()
    gc.collect()
    gc.freeze()  # the children's collections leave these pages shared
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    try:
        return _keep_running(world, main, final, policy, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        gc.unfreeze()


def _keep_running(
    world: int, main: Callable[[Place], int], final: Collection[int], policy: RankPolicy, mask: Collection[int]
) -> int:
    delay, failures, remembered = policy.first_delay, 0, ""
    while True:
        started = time.monotonic()
        group = _RankGroup(world, policy)
        try:
            group.start(main, remembered, mask)
            status = group.run(final)
        finally:
            note = group.close()
        if status == 0 or status in final or group.stopping:
            return status
        failures = 0 if note else failures + 1
        remembered = note or remembered
        if failures >= policy.start_attempts:
            log.error("%d groups of ranks were lost before they were at work: giving up", failures)
            return status
        if time.monotonic() - started >= policy.reset_after:
            delay = policy.first_delay
        log.warning("the group of ranks is lost: a new one starts in %g s", delay)
        if signal.sigtimedwait(_STOPS, delay) is not None:
            return 0
        delay = min(2 * delay, policy.longest_delay)


class _RankGroup:
    """The processes of one group, seen from their parent, which has SIGCHLD and the stopping signals blocked."""

    def __init__(self, world: int, policy: RankPolicy) -> None:
        self.stopping = False
        self._world, self._policy = world, policy
        self._living: dict[int, int] = {}
        """Process ids by rank."""
        self._ended: dict[int, int] = {}
        """Exit statuses by rank, negative for a signal."""
        self._note, self._note_writer = os.pipe()
        self._meeting = os.memfd_create("ranks")

    def start(self, main: Callable[[Place], int], remembered: str, mask: Collection[int]) -> None:
        """Forks the ranks. Raises OSError; `close` cleans up."""
        parent = os.getpid()
        meeting = Path(f"/proc/self/fd/{self._meeting}")
        for rank in range(self._world):
            place = Place(rank, meeting, remembered, self._note_writer)
            pid = os.fork()
            if pid == 0:
                become_rank(lambda: main(place), parent, leader=rank == 0, mask=mask)  # noqa: B023 - ends in there
            self._living[rank] = pid

    def run(self, final: Collection[int]) -> int:
        """Waits until the group has ended, or is to be killed; returns the launcher's exit status."""
        # Others may end well just before rank 0, which told them to.
        self._watch(lambda: 0 in self._ended or any(self._ended.values()))
        if 0 in self._living and not self._hopeless(final):
            if any(self._ended.values()):
                os.kill(self._living[0], LOST)
            self._watch(lambda: 0 in self._ended, self._policy.fault_grace)
        if self._ended.get(0) == 0:
            self._watch(lambda: not self._living, self._policy.stop_grace)
            return 0
        for rank, status in sorted(self._ended.items()):
            log.warning("rank %d %s", rank, _told(status))
        self.kill()
        if self.stopping and self._ended.get(0) == -signal.SIGTERM:
            return 0  # it was told before it served, and so before it knew better
        return self._hopeless(final) or max(1, self._ended.get(0, 1))

    def kill(self) -> None:
        """Ends what still lives, stopped processes among them, and waits for it."""
        for pid in self._living.values():
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the id is still its own
        for rank, pid in list(self._living.items()):
            self._reaped(rank, os.waitpid(pid, 0)[1])

    def close(self) -> str:
        """Kills what still lives, and returns what rank 0 had noted down."""
        self.kill()
        os.close(self._note_writer)
        with open(self._note, "rb") as pipe:
            text = pipe.read().decode()
        os.close(self._meeting)
        return text

    def _hopeless(self, final: Collection[int]) -> int:
        """The first rank's status that is final; 0 for none."""
        return next((status for _, status in sorted(self._ended.items()) if status in final), 0)

    def _watch(self, done: Callable[[], bool], seconds: float = float("inf")) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self._reap()
            left = deadline - time.monotonic()
            if done() or left <= 0:
                return
            # A child that ended before this line left its signal pending: none is missed.
            got = signal.sigtimedwait(_WATCHED, min(left, 3600.0))
            if got is not None and got.si_signo in _STOPS:
                self.stopping = True
                if 0 in self._living:
                    os.kill(self._living[0], signal.SIGTERM)

    def _reap(self) -> None:
        for rank, pid in list(self._living.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._reaped(rank, status)

    def _reaped(self, rank: int, status: int) -> None:
        del self._living[rank]
        self._ended[rank] = os.waitstatus_to_exitcode(status)


def _told(status: int) -> str:
    return f"exited with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
