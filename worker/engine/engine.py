"""The step loop: schedule, execute, apply, report.

The engine runs in one thread of its own. Others hand it work through `submit` and `abort`, which only append to an
inbox; it hands back one `StepReport` a step through the `deliver` callback and never waits for whoever reads it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from worker.engine.block_pool import BlockPool, CacheChanges
from worker.engine.constraint import Standing
from worker.engine.plan import NO_TOKEN, Clock, Drawn, ModelRunner
from worker.engine.scheduler import Scheduled, Scheduler, SchedulerLimits
from worker.engine.sequence import EndReason, Request, SequenceState
from worker.engine.step_cost import StepShape

log = logging.getLogger(__name__)

MOVED_REQUESTS = 1024
"""Requests that had a place at another engine are taken beyond the limit, up to so many."""
IDLE_SECONDS_BEFORE_CHECK = 1.0
"""The books of scheduler and pool are verified once the engine has had nothing to do for this long."""


class QueueFull(Exception):
    """As many requests are there as may."""


class NeverFits(Exception):
    """The request needs more KV blocks than there are."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a request began; reported with the first token of its first choice."""

    cached_tokens: int
    queue_seconds: float
    prefill_seconds: float
    prompt_scores: Sequence[Drawn] = ()
    """Log-probabilities of the prompt's tokens behind the first, if asked for."""


@dataclass(frozen=True, slots=True)
class SequenceReport:
    """A token that a step brought to a sequence. Of several that a step brought to one, reports come in order."""

    key: Hashable
    choice: int
    token_index: int
    """Index of `drawn` among the choice's generated ids."""
    drawn: Drawn
    """`NO_TOKEN` where no id could be drawn: then it has ended."""
    start: Start | None
    end: EndReason | None


@dataclass(frozen=True, slots=True)
class LoadReport:
    running: int
    waiting: int
    waiting_prefill_tokens: int
    blocks_in_use: int
    blocks_cached: int
    blocks_free: int
    preemptions: int
    """Since the engine was made; so are those below."""
    drafted_tokens: int
    """Ids that were guessed, and those of them that were drawn."""
    accepted_tokens: int
    prompt_tokens: int
    """Of requests that have begun."""
    cached_tokens: int
    """Those of them that were found in the prefix cache."""
    evictions: int
    """Blocks with a cached prefix that were given to another use."""
    prefill_tokens_per_second: float
    """0 while nothing was measured."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step brought. Steps that only removed sequences are reported too, for the load they leave, and those
    that only had a snapshot to take."""

    number: int
    sequences: list[SequenceReport]
    expired: list[Hashable]
    """Requests whose deadline has passed."""
    too_complex: list[Hashable]
    """Requests with a choice whose constraint took more work than it may."""
    load: LoadReport
    cache: CacheChanges
    """What the prefix cache holds now and didn't before the step, and the other way around; empty if not watched."""
    snapshot: list[bytes] | None
    """Hashes of all that the prefix cache holds after the step, if `watch_cache` asked since the last one."""


class _Pace:
    """How long steps take: a moving average of seconds a token, in which few tokens count as many as cost the same."""

    _LEAST_TOKENS = 32
    _WEIGHT = 0.1

    def __init__(self) -> None:
        self._per_token = math.inf

    def take(self, tokens: int, seconds: float) -> None:
        measured = seconds / max(tokens, self._LEAST_TOKENS)
        first = self._per_token == math.inf
        self._per_token = measured if first else self._per_token + self._WEIGHT * (measured - self._per_token)

    def seconds(self, tokens: int) -> float:
        """0 for no tokens; infinite while nothing was measured."""
        return max(tokens, self._LEAST_TOKENS) * self._per_token if tokens else 0.0


class _PrefillRate:
    """How fast prompts are computed: a moving average over steps that consist mostly of them."""

    _LEAST_TOKENS = 64
    _WEIGHT = 0.1

    def __init__(self) -> None:
        self.tokens_per_second = 0.0

    def take(self, tokens: int, seconds: float) -> None:
        if tokens >= self._LEAST_TOKENS and seconds > 0:
            measured = tokens / seconds
            weight = self._WEIGHT if self.tokens_per_second else 1.0
            self.tokens_per_second += weight * (measured - self.tokens_per_second)


@dataclass(slots=True)
class _Inbox:
    submits: deque[tuple[Request, float]] = field(default_factory=deque)
    """With the time of arrival."""
    aborts: deque[tuple[Hashable, int | None]] = field(default_factory=deque)
    """Requests, or single choices of them."""
    watched: bool = False
    """Whether the changes of the prefix cache are wanted."""
    snapshot: bool = False
    stopping: bool = False


class Engine:
    """Runs requests on a model runner.

    Args:
        deliver: called from the engine's thread with each step's report.
        fault: called from the engine's thread with the keys of the requests in a step that raised; the engine has
            stopped for good by then, and the process is expected to exit.
        max_waiting: requests that may be there beyond `limits.max_running`, those in the inbox counted.
        check_steps: verify the books of scheduler and pool after every step, and not only once nothing is left to do.
    """

    def __init__(
        self,
        runner: ModelRunner,
        limits: SchedulerLimits,
        *,
        max_waiting: int,
        clock: Clock,
        deliver: Callable[[StepReport], None],
        fault: Callable[[list[Hashable]], None],
        check_steps: bool = False,
    ) -> None:
        self.pool = BlockPool(runner.num_blocks, runner.block_size)
        self.scheduler = Scheduler(self.pool, limits)
        self._runner = runner
        self._max_requests = limits.max_running + max_waiting
        self._clock = clock
        self._deliver = deliver
        self._fault = fault
        self._check_steps = check_steps
        self._inbox = _Inbox()
        self._wake = threading.Condition()
        self._requests: dict[Hashable, list[SequenceState]] = {}
        """The sequences of each request that are not ended."""
        self._thread: threading.Thread | None = None
        self._step_started: float | None = None
        self._executing: list[SequenceState] = []
        self._executing_tokens = 0
        self._pace = _Pace()
        self._prefill_rate = _PrefillRate()
        self._failed: list[Hashable] = []
        """Requests of which a choice has failed in the step that runs."""
        self._aborted_some = False
        self.steps = 0
        self.load = self._count_load()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the step that is running, and waits for that."""
        with self._wake:
            self._inbox.stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, request: Request) -> None:
        """Queues a request. Raises QueueFull or NeverFits; any thread."""
        if not self.scheduler.fits(len(request.prompt_ids) + request.max_tokens):
            raise NeverFits
        with self._wake:
            # Not by who waits now: of a burst on an idle worker all do until its next step.
            limit = self._max_requests + (MOVED_REQUESTS if request.moved else 0)
            # What was aborted leaves with the next step, and its place is free.
            leaving = sum(choice is None and key in self._requests for key, choice in self._inbox.aborts)
            if len(self._requests) - leaving + len(self._inbox.submits) >= limit:
                raise QueueFull
            self._inbox.submits.append((request, self._clock()))
            self._wake.notify()

    def abort(self, keys: Iterable[Hashable]) -> None:
        """Drops requests; unknown keys are ignored. Their blocks are free before the next step. Any thread."""
        with self._wake:
            self._inbox.aborts.extend((key, None) for key in keys)
            self._wake.notify()

    def abort_choice(self, key: Hashable, choice: int) -> None:
        """Drops one choice of a request whose others go on; unknown ones are ignored. Any thread."""
        with self._wake:
            self._inbox.aborts.append((key, choice))
            self._wake.notify()

    def watch_cache(self, watched: bool) -> None:
        """Asks for the prefix cache's changes in every report from the next one on, and for a snapshot in that one; or
        for no more of them. A snapshot and the changes of all reports behind it are what the cache holds. Any thread.
        """
        with self._wake:
            self._inbox.watched = self._inbox.snapshot = watched
            self._wake.notify()

    def seconds_in_step(self) -> float:
        """How long the running step has taken so far; 0 between steps."""
        started = self._step_started
        return 0.0 if started is None else self._clock() - started

    def predicted_seconds(self) -> float:
        """How long the running step should take, by those before it; 0 between steps, infinite for the first."""
        return self._pace.seconds(self._executing_tokens)

    def executing(self) -> list[Hashable]:
        """The requests in the running step. Any thread."""
        return list(dict.fromkeys(sequence.request.key for sequence in self._executing))

    def step(self) -> StepReport | None:
        """Takes in what arrived, runs one step, and returns its report; None if there was nothing to do."""
        now = self._clock()
        snapshot = self._take_inbox()
        late = [key for key, sequences in self._requests.items() if sequences[0].request.deadline <= now]
        for key in late:
            for sequence in list(self._requests[key]):
                self._end(sequence)
        scheduled = self.scheduler.schedule(now)
        if not (scheduled.sequences or late or self._aborted_some or snapshot):
            return None
        reports = self._execute(scheduled, now) if scheduled.sequences else []
        too_complex = self._end_failed()
        reports = [report for report in reports if report.key not in too_complex]
        self._aborted_some = False
        if self._check_steps:
            self.scheduler.check()
        self.load = self._count_load()
        cache = self.pool.take_changes()
        hashes = self.pool.hashes() if snapshot else None
        return StepReport(self.steps, reports, late, too_complex, self.load, cache, hashes)

    def _execute(self, scheduled: Scheduled, now: float) -> list[SequenceReport]:
        self._executing_tokens = scheduled.plan.num_tokens
        self._step_started, self._executing = now, scheduled.sequences
        drawn = self._runner.execute(scheduled.plan)
        seconds = self._clock() - now
        self._pace.take(self._executing_tokens, seconds)
        if all(len(chunk.token_ids) == 1 + chunk.drafts for chunk in scheduled.plan.chunks):
            self.scheduler.speculation.timed(self._executing_tokens, seconds)
        self.scheduler.cost.take(StepShape.of(scheduled.plan.chunks), seconds)
        prompts = [chunk for chunk in scheduled.plan.chunks if len(chunk.token_ids) > 1 + chunk.drafts]
        self._prefill_rate.take(sum(len(chunk.token_ids) for chunk in prompts), seconds)
        self._step_started, self._executing, self._executing_tokens = None, [], 0
        self.steps += 1
        reports = []
        for sequence, chunk, tokens in zip(scheduled.sequences, scheduled.plan.chunks, drawn, strict=True):
            if chunk.drafts:
                reports += self._verify(sequence, chunk.token_ids[-chunk.drafts :], tokens)
                continue
            if chunk.scored:
                sequence.take_scores(tokens[: len(chunk.scored)])
                tokens = tokens[len(chunk.scored) :]
            self.scheduler.computed(sequence, len(chunk.token_ids))
            if tokens:
                reports += self._apply(sequence, tokens)
        return reports

    def _verify(self, sequence: SequenceState, drafts: Sequence[int], drawn: Sequence[Drawn]) -> list[SequenceReport]:
        """Adds drawn tokens to a sequence one by one, each as a step of its own would have, as long as the drafts in
        front of them are what was drawn there."""
        reports: list[SequenceReport] = []
        for token, draft in zip(drawn, (*drafts, NO_TOKEN), strict=True):
            self.scheduler.computed(sequence, 1)
            reports += self._apply(sequence, [token])
            over = reports[-1].end is not None or sequence.standing is Standing.FAILED
            if over or token.token_id != draft:
                break
        self.scheduler.verified(sequence, len(drafts), len(reports) - 1)
        return reports

    def _apply(self, sequence: SequenceState, drawn: Sequence[Drawn]) -> list[SequenceReport]:
        """Adds the first of the drawn tokens to its sequence; the others each begin a choice with the same prompt."""
        request = sequence.request
        first, *others = drawn
        if sequence.choice == request.first_choice and sequence.num_generated == len(request.choices[sequence.choice]):
            began = sequence.first_scheduled if sequence.first_scheduled is not None else sequence.arrival
            start = Start(
                sequence.cached_tokens, began - sequence.arrival, self._clock() - began, sequence.prompt_scores[:]
            )
        else:
            start = None
        forks = [sequence.fork(choice, token.token_id) for choice, token in enumerate(others, sequence.choice + 1)]
        sequence.unborn = 0
        sequence.take(first.token_id)
        reports = [_report(sequence, first, start)]
        reports += [_report(fork, token, None) for fork, token in zip(forks, others, strict=True)]
        if forks:
            self._requests[request.key] += forks
            for fork in forks:
                self.scheduler.fork(sequence, fork)
        for member, report in zip((sequence, *forks), reports, strict=True):
            if member.standing is Standing.FAILED:
                self._failed.append(request.key)
            elif report.end is not None:
                self._end(member)
        return reports

    def _end_failed(self) -> list[Hashable]:
        """Ends the requests of which a choice has failed, and returns their keys."""
        failed, self._failed = list(dict.fromkeys(self._failed)), []
        for key in failed:
            for sequence in list(self._requests[key]):
                self._end(sequence)
        return failed

    def _take_inbox(self) -> bool:
        """Takes in what arrived; returns whether a snapshot of the prefix cache is wanted."""
        with self._wake:
            watched, snapshot, self._inbox.snapshot = self._inbox.watched, self._inbox.snapshot, False
            submits, aborts = self._inbox.submits, self._inbox.aborts
            self._inbox.submits, self._inbox.aborts = deque(), deque()
            for request, arrival in submits:
                sequences = SequenceState.of(request, arrival)
                self._requests[request.key] = sequences
                for sequence in sequences:
                    self.scheduler.add(sequence, arrival)
        # Whoever aborts a request has submitted it before: its submit is in by now.
        for key, choice in aborts:
            aborted = [s for s in self._requests.get(key, ()) if choice is None or s.choice == choice]
            for sequence in aborted:
                self._end(sequence)
                self._aborted_some = True
        self.pool.watch(watched)
        return snapshot

    def _end(self, sequence: SequenceState) -> None:
        """Takes out a sequence that has all of its tokens, or wants no more."""
        self.scheduler.remove(sequence)
        siblings = self._requests[sequence.request.key]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.key]

    def _count_load(self) -> LoadReport:
        return LoadReport(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            waiting_prefill_tokens=self.scheduler.waiting_tokens(),
            blocks_in_use=self.pool.num_used,
            blocks_cached=self.pool.num_cached,
            blocks_free=self.pool.num_free,
            preemptions=self.scheduler.preemptions,
            drafted_tokens=self.scheduler.speculation.drafted,
            accepted_tokens=self.scheduler.speculation.accepted,
            prompt_tokens=self.scheduler.prompt_tokens,
            cached_tokens=self.scheduler.cached_tokens,
            evictions=self.pool.evictions,
            prefill_tokens_per_second=self._prefill_rate.tokens_per_second,
        )

    def _run(self) -> None:
        try:
            while not self._inbox.stopping:
                report = self.step()
                if report is not None:
                    self._deliver(report)
                else:
                    self._sleep()
        except Exception:
            log.exception("step %d raised; the process ends", self.steps + 1)
            self._fault(self.executing())

    def _sleep(self) -> None:
        """Waits for work; verifies the books once if none comes for a while."""
        with self._wake:
            if self._wake.wait_for(self._has_work, IDLE_SECONDS_BEFORE_CHECK):
                return
        self.scheduler.check()
        with self._wake:
            self._wake.wait_for(self._has_work)

    def _has_work(self) -> bool:
        inbox = self._inbox
        return bool(inbox.submits or inbox.aborts or inbox.snapshot or inbox.stopping)


def _report(sequence: SequenceState, drawn: Drawn, start: Start | None) -> SequenceReport:
    """What was drawn for a sequence that has taken it in."""
    index = sequence.num_generated - (drawn.token_id != NO_TOKEN)
    return SequenceReport(sequence.request.key, sequence.choice, index, drawn, start, sequence.end_reason())
