"""Placement on a trace: `python -m benchmarks.placement [--workers 8] [--policy NAME ...]`.

Conversations that begin with shared system prompts are replayed on simulated workers. A worker is the real engine over
a `FakeRunner`, on a clock that is not waited for; the policies, the table of blocks and what the router counts are the
router's own. The oracle is one worker whose cache never ends: no placement finds more.

Then `--decision`: how long a choice takes at 64 workers and 5 million blocks, and what the table weighs.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import random
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from qwire import prefix
from qwire.v1 import models_pb2
from qwire.v1 import worker_pb2 as pb
from router.block_index import MAX_WORKERS, BlockIndex, keys_of
from router.cache_index import CacheIndex
from router.fleet import Fleet
from router.placement import POLICIES, Candidate, Policy
from router.worker_link import WorkerLink
from worker.engine.engine import Engine, StepReport
from worker.engine.plan import Drawn, StepPlan
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.fake import FakeRunner, StepCost

SEED = 11
VOCABULARY = 32_000
BLOCK = 16
ROOT = bytes(16)


@dataclass(frozen=True, slots=True)
class TraceShape:
    """Conversations of a trace; times are in seconds, lengths in tokens."""

    conversations: int = 400
    per_second: float = 2.0
    system_prompts: int = 32
    system_tokens: tuple[int, int] = (200, 1500)
    turns: tuple[int, int] = (1, 6)
    said_tokens: tuple[int, int] = (20, 300)
    answer_tokens: tuple[int, int] = (20, 120)
    think_seconds: float = 6.0


@dataclass(slots=True)
class Conversation:
    """One of a trace: what its user says and when, but not the answers, which are the workers'."""

    starts: float
    opening: list[int]
    said: list[list[int]]
    answers: list[int]
    pauses: list[float]


def trace(shape: TraceShape, seed: int = SEED) -> list[Conversation]:
    """System prompts by Zipf's law, beginnings by a Poisson process: the same for the same seed."""
    chance = random.Random(seed)

    def tokens(span: tuple[int, int]) -> list[int]:
        return [chance.randrange(VOCABULARY) for _ in range(chance.randint(*span))]

    openings = [tokens(shape.system_tokens) for _ in range(shape.system_prompts)]
    weights = [1 / rank for rank in range(1, shape.system_prompts + 1)]
    found, now = [], 0.0
    for _ in range(shape.conversations):
        now += chance.expovariate(shape.per_second)
        turns = chance.randint(*shape.turns)
        found.append(
            Conversation(
                now,
                chance.choices(openings, weights)[0],
                [tokens(shape.said_tokens) for _ in range(turns)],
                [chance.randint(*shape.answer_tokens) for _ in range(turns)],
                [chance.expovariate(1 / shape.think_seconds) for _ in range(turns)],
            )
        )
    return found


class CountingRunner(FakeRunner):
    """Counts tokens instead of waiting."""

    tokens = 0

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        self.tokens = plan.num_tokens
        return super().execute(plan)


class Worker:
    """A simulated worker, and what a router knows of it."""

    def __init__(self, number: int, blocks: int, running: int, cost: StepCost, cache: CacheIndex) -> None:
        self.number = number
        self.now = 0.0
        self.capacity = running
        self.cache = cache
        self.pending: dict[int, int] = {}
        """Tokens to compute of requests that have no token yet."""
        self.streams: set[int] = set()
        self._cost = cost
        self._runner = CountingRunner(blocks, BLOCK, VOCABULARY)
        self._engine = Engine(
            self._runner,
            SchedulerLimits(512, running),
            max_waiting=1_000_000,
            clock=lambda: self.now,
            deliver=lambda report: None,
            fault=lambda keys: None,
        )
        self._engine.watch_cache(True)
        self.step()

    def submit(self, request: Request, uncached: int) -> None:
        assert isinstance(request.key, int)
        self.pending[request.key] = uncached
        self.streams.add(request.key)
        self._engine.submit(request)

    def step(self) -> StepReport | None:
        """Runs a step; `now` is its end. None where there is nothing to do."""
        report = self._engine.step()
        if report is None:
            return None
        self.now += self._cost.of(self._runner.tokens) if report.sequences or self.streams else 0.0
        if report.snapshot is not None:
            self.cache.take(pb.WatchCacheResponse(snapshot=True, snapshot_end=True))
        stored, removed = b"".join(report.cache.stored), b"".join(report.cache.removed)
        self.cache.take(pb.WatchCacheResponse(stored=stored, removed=removed))
        for sequence in report.sequences:
            assert isinstance(sequence.key, int)
            self.pending.pop(sequence.key, None)
            if sequence.end is not None:
                self.streams.discard(sequence.key)
        return report

    def candidate(self, cached: int) -> Candidate:
        return Candidate(self.number, len(self.streams), sum(self.pending.values()), self.capacity, cached)


@dataclass
class Outcome:
    """What a replay came to."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    waits: list[float] = field(default_factory=list)
    """Seconds from arrival to the first token."""
    seconds: float = 0.0

    def wait(self, part: float) -> float:
        return sorted(self.waits)[min(len(self.waits) - 1, int(part * len(self.waits)))]


@dataclass(slots=True)
class _Turn:
    conversation: Conversation
    number: int
    prompt: list[int]
    arrival: float


def replay(
    conversations: Sequence[Conversation],
    policy: Policy,
    *,
    workers: int,
    blocks: int = 4096,
    running: int = 32,
    cost: StepCost | None = None,
) -> Outcome:
    """Runs a trace to its end. A turn is asked when the answer before it has been read and thought over."""
    table = BlockIndex()
    fleet = [
        Worker(number, blocks, running, cost or StepCost(0.015, 0.000_12), CacheIndex(table, number))
        for number in range(workers)
    ]
    outcome, keys = Outcome(), itertools.count()
    turns: dict[int, _Turn] = {}
    answers: dict[int, list[int]] = {}
    events: list[tuple[float, int, Callable[[], None]]] = []

    def at(when: float, run: Callable[[], None]) -> None:
        heapq.heappush(events, (when, next(keys), run))

    def ask(turn: _Turn) -> None:
        key = next(keys)
        turns[key], answers[key] = turn, []
        hashed = prefix.block_hashes(ROOT, turn.prompt[:-1], BLOCK)
        held = table.leading(keys_of(b"".join(hashed)), range(workers))
        candidates = [worker.candidate(BLOCK * held[worker.number]) for worker in fleet]
        chosen = policy.choose(candidates, len(turn.prompt))
        worker = fleet[chosen.index]
        idle = not worker.streams
        request = Request(key, turn.prompt, max_tokens=turn.conversation.answers[turn.number], prefix_root=ROOT)
        worker.submit(request, len(turn.prompt) - chosen.cached_tokens)
        if idle:
            worker.now = max(worker.now, turn.arrival)
            at(worker.now, lambda: run(worker))

    def run(worker: Worker) -> None:
        report = worker.step()
        if report is None:
            return
        for sequence in report.sequences:
            assert isinstance(sequence.key, int)
            turn = turns[sequence.key]
            answers[sequence.key].append(sequence.drawn.token_id)
            if sequence.start is not None:
                outcome.prompt_tokens += len(turn.prompt)
                outcome.cached_tokens += sequence.start.cached_tokens
                outcome.waits.append(worker.now - turn.arrival)
            if sequence.end is not None:
                outcome.seconds = max(outcome.seconds, worker.now)
                answered(turn, answers.pop(sequence.key), worker.now)
                del turns[sequence.key]
        at(worker.now, lambda: run(worker))

    def answered(turn: _Turn, answer: list[int], now: float) -> None:
        talk, number = turn.conversation, turn.number + 1
        if number < len(talk.said):
            when = now + talk.pauses[number]
            following = _Turn(talk, number, [*turn.prompt, *answer, *talk.said[number]], when)
            at(when, lambda: ask(following))

    for talk in conversations:
        first = _Turn(talk, 0, [*talk.opening, *talk.said[0]], talk.starts)
        at(talk.starts, lambda first=first: ask(first))  # type: ignore[misc]
    while events:
        _, _, event = heapq.heappop(events)
        event()
    return outcome


def oracle(conversations: Sequence[Conversation], blocks: int = 1_000_000) -> Outcome:
    """One worker, endless and so fast that everything before is computed when a request comes."""
    return replay(conversations, POLICIES["round-robin"](), workers=1, blocks=blocks, running=256, cost=StepCost(1e-6))


async def decision(workers: int = 64, blocks: int = 5_000_000, prompt_tokens: int = 4_000) -> dict[str, float]:
    """A choice by `Fleet.place`, for a prompt of which every worker holds another part: in microseconds, and bytes."""
    chance = random.Random(SEED)
    table = BlockIndex()
    links = []
    for number in range(workers):
        link = WorkerLink(f"target-{number}", "r", lambda requests: None, CacheIndex(table, number % MAX_WORKERS))
        link.info = pb.WorkerInfo(
            model=models_pb2.ModelInfo(name="m"), block_size=BLOCK, kv_dtype="f", max_running=64, max_waiting=64
        )
        link.ready = True
        link.cache.take(pb.WatchCacheResponse(snapshot=True, snapshot_end=True))
        links.append(link)
    for start in range(0, blocks, 10_000):
        keys = array("Q", chance.randbytes(8 * 10_000))
        table.add(start // 10_000 % workers, keys)
    prompt = [chance.randrange(VOCABULARY) for _ in range(prompt_tokens)]
    root = prefix.root(b"", "f", BLOCK, "", ROOT)
    hashes = prefix.block_hashes(root, prompt, BLOCK)
    for number, link in enumerate(links):
        stored = b"".join(hashes[: len(hashes) * (number + 1) // workers])
        link.cache.take(pb.WatchCacheResponse(stored=stored))
    fleet = Fleet(links, 0.0, POLICIES["prefix"])
    taken = []
    for _ in range(200):
        started = time.perf_counter()
        place = await fleet.place("m", prompt, ROOT)
        taken.append(1e6 * (time.perf_counter() - started))
        assert place.link is links[-1]
    started = time.perf_counter()
    for _ in range(50):
        prefix.block_hashes(root, prompt, BLOCK)
    return {
        "decision_us_p50": statistics.median(taken),
        "decision_us_least": min(taken),
        "of_which_hashing_us": 1e6 * (time.perf_counter() - started) / 50,
        "table_mb": table.nbytes / 1e6,
    }


def _rows(conversations: Sequence[Conversation], names: Sequence[str], workers: int) -> Iterator[dict[str, object]]:
    best = oracle(conversations)
    yield {"policy": "oracle", "requests": len(best.waits), "cached": round(best.cached_tokens / best.prompt_tokens, 4)}
    for name in names:
        found = replay(conversations, POLICIES[name](), workers=workers)
        yield {
            "policy": name,
            "workers": workers,
            "cached": round(found.cached_tokens / found.prompt_tokens, 4),
            "of_oracle": round(found.cached_tokens / best.cached_tokens, 4),
            "wait_p50_ms": round(1e3 * found.wait(0.5), 1),
            "wait_p99_ms": round(1e3 * found.wait(0.99), 1),
            "seconds": round(found.seconds, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="*", default=[8])
    parser.add_argument("--policy", nargs="*", default=list(POLICIES))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--decision", action="store_true")
    arguments = parser.parse_args()
    if arguments.decision:
        print(json.dumps({name: round(value, 1) for name, value in asyncio.run(decision()).items()}))
        return
    for workers in arguments.workers:
        shape = TraceShape(conversations=50 * workers, per_second=workers / 4)
        for row in _rows(trace(shape, arguments.seed), arguments.policy, workers):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
