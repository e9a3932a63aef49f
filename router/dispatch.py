"""One request's way through workers: placed at one, and at another whenever that one is lost.

Nothing is stored for this but the journal. Prompt, resolved parameters, seed and the ids so far are all that a worker
of the same numerics needs to go on token for token, whatever penalties, stop strings or limits the request has.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc

from qwire.errors import QwireError, Reason
from qwire.v1 import worker_pb2 as pb
from qwire.v1.generation_pb2 import Constraint
from router.admission import Wanted
from router.fleet import AllFull, Fleet, Place, prefix_root
from router.journal import Journal, Lost, Why
from router.worker_link import WorkerLink

log = logging.getLogger(__name__)

FAULTS = 2
"""Workers that may fail in a step with a request, without having got a token of it, before the request is to blame."""


@dataclass(frozen=True, slots=True)
class Work:
    """What workers are asked for, of which only the ids that a request has got so far change."""

    model: str
    prompt_ids: Sequence[int]
    params: pb.ResolvedParams
    scope: bytes
    """Whose requests share cached blocks."""
    bypass: bool
    """The request leaves the prefix cache alone."""
    best_effort: bool
    """Other numerics are better than none."""
    arrival: float
    """On the monotonic clock, in seconds; so is the deadline."""
    tenant: bytes = b""
    """What workers know its tenant by."""
    priority: int = 0
    deadline: float = math.inf
    numerics_id: str = ""
    """What its first worker's must be, for a stream that goes on here; empty for any."""
    constraint: Constraint | None = None
    prompt_logprobs: int | None = None
    """Alternatives of the log-probabilities that are wanted of the prompt; None for none of these."""

    @property
    def needs(self) -> frozenset[pb.Feature.ValueType]:
        """What a worker must have besides what all of them have."""
        wanted = {
            pb.FEATURE_CONSTRAINTS: self.constraint is not None,
            pb.FEATURE_PROMPT_LOGPROBS: self.prompt_logprobs is not None,
        }
        return frozenset(feature for feature, needed in wanted.items() if needed)


class Turn(Protocol):
    """A request's place in the queue."""

    async def wait(self, wanted: Wanted) -> None:
        """Returns at once where it has had its turn. Raises QwireError where it won't get one."""

    def placed(self, uncached_tokens: int) -> None:
        """A worker was sent it."""

    def put_back(self) -> None:
        """No worker had room for it after all."""


class Dispatch:
    """Runs one request. `run` in a task of its own, and `release` however the stream ends.

    Args:
        turn: what it waits for before its first worker. One that moves has had it.
    """

    def __init__(self, work: Work, journal: Journal, fleet: Fleet, max_moves: int, turn: Turn) -> None:
        self.numerics_id = work.numerics_id
        """That of the worker which has it; from its admission on that of those which may."""
        self._work = work
        self._journal = journal
        self._fleet = fleet
        self._max_moves = max_moves
        self._turn = turn
        self._moved = False
        """Whether a worker has had it before."""
        self._faults = 0
        """Workers that failed in a step with it since it last got a token."""
        self._held: tuple[WorkerLink, int] | None = None
        """The attempt that goes on."""

    async def run(self) -> None:
        """Ends when no more ids are wanted, or the journal has failed."""
        try:
            await self._run()
        except QwireError as error:
            self._journal.fail(error)
        except Exception:
            log.exception("the dispatch of a request failed")
            self._journal.fail(
                QwireError(grpc.StatusCode.INTERNAL, "the server failed; its log says more", reason=Reason.INTERNAL)
            )

    def release(self) -> None:
        """Stops what runs at a worker. `run` must not go on after this."""
        if self._held is not None:
            link, attempt = self._held
            link.release(attempt, finished=self._journal.ended_at_worker)
            self._held = None

    async def _run(self) -> None:
        refused: dict[WorkerLink, QwireError] = {}
        while self._journal.needs_worker:
            place = await self._place(refused)
            try:
                attempt = place.link.submit(self._journal, self._submit(place), place.uncached_tokens)
            except QwireError as error:
                refused[place.link] = error
                continue
            self._turn.placed(place.uncached_tokens)
            self._held = place.link, attempt
            lost = await self._journal.lost
            self._held = None
            if lost.why is not Why.REFUSED:
                refused.clear()
                self._move(lost)
            elif lost.error.code is grpc.StatusCode.INVALID_ARGUMENT:
                raise lost.error  # no other worker would take it either
            elif lost.error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not self._moved:
                self._turn.put_back()  # others fill it too: until it says that it has room, it is passed over
            elif place.link.ready:
                refused[place.link] = lost.error
            # else it drains: whoever is ready, or will be, may take the request.

    async def _place(self, refused: dict[WorkerLink, QwireError]) -> Place:
        """Chooses the next worker. Once a client knows its numerics they are kept, or else it is told."""
        journal, work = self._journal, self._work
        bound = self.numerics_id if work.numerics_id or journal.admitted.done() else ""
        ids = work.prompt_ids
        if longest := max((choice.ids for choice in journal.choices if choice.needs_worker), key=len):
            ids = [*ids, *longest]
        while True:
            if not self._moved:
                await self._turn.wait(Wanted(work.model, work.needs, bound))
            try:
                place = await self._fleet.place(
                    work.model,
                    ids,
                    work.scope,
                    needs=work.needs,
                    bypass=work.bypass,
                    numerics_id=bound,
                    moved=self._moved,
                    refused=refused,
                )
                break
            except AllFull:
                self._turn.put_back()
            except QwireError as error:
                if not work.best_effort or error.reason != Reason.NO_EQUIVALENT_WORKER:
                    raise
                bound, journal.exact = "", False
        self.numerics_id = place.worker.model.numerics_id
        return place

    def _submit(self, place: Place) -> pb.Submit:
        work, now = self._work, time.monotonic()
        return pb.Submit(
            prompt_ids=work.prompt_ids,
            choices=self._journal.submit_choices(),
            params=work.params,
            remaining_ms=None if work.deadline == math.inf else max(0, round((work.deadline - now) * 1000)),
            prefix_root=prefix_root(place.worker, work.scope),
            bypass_prefix_cache=work.bypass,
            constraint=work.constraint,
            prompt_logprobs=None if self._journal.prompt_scored else work.prompt_logprobs,
            moved=self._moved,
            waited_ms=round((now - work.arrival) * 1000),
            suspect=self._faults > 0,
            priority=work.priority,
            tenant=work.tenant,
        )

    def _move(self, lost: Lost) -> None:
        """Takes note of a lost worker. Raises QwireError where there may not be another."""
        journal = self._journal
        if not journal.needs_worker:
            return
        if journal.yielded:
            self._faults = 0
        if lost.why is Why.FAULT:
            self._faults += 1
        if self._faults >= FAULTS:
            raise QwireError(
                grpc.StatusCode.INTERNAL,
                f"{FAULTS} workers failed when they computed the request",
                reason=Reason.REQUEST_FAULTS_WORKER,
            )
        if journal.moves >= self._max_moves:
            raise lost.error
        self._moved = True
        journal.moves += 1
