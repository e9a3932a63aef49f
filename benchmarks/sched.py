"""The scheduler without a model: policies compared on traces, and lives at random by the hundred thousand.

    python -m benchmarks.sched trace [--rate 1.0] [--seconds 120] [--json]
    python -m benchmarks.sched lives [--count 100000] [--seed 0]
    python -m benchmarks.sched pool [--operations 10000000] [--seed 0]

`trace` runs the step loop on a clock that its steps move by what a machine would take for them, so a trace of minutes
takes seconds. `lives` and `pool` verify the books after every step or operation and end with exit status 1 where they
are broken, or where a request is starved.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, dataclass, field

import click

from qwire import prefix
from worker.engine.block_pool import BlockPool
from worker.engine.engine import Engine, StepReport
from worker.engine.plan import Drawn, StepPlan
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.engine.step_cost import StepShape
from worker.fake.runner import FakeRunner

VOCAB = 1000


@dataclass(frozen=True, slots=True)
class Machine:
    """What steps take, in seconds. The default is about Qwen3-0.6B in bf16 on two cores."""

    fixed: float = 0.080
    row: float = 0.003
    token: float = 0.003
    position: float = 3e-7
    noise: float = 0.05

    def seconds(self, plan: StepPlan, chance: random.Random) -> float:
        shape = StepShape.of(plan.chunks)
        exact = self.fixed + self.row * shape.rows + self.token * shape.tokens + self.position * shape.attended
        return exact * chance.lognormvariate(0.0, self.noise)


class TimedRunner(FakeRunner):
    """Moves a clock by what each step takes."""

    def __init__(self, num_blocks: int, block_size: int, machine: Machine, chance: random.Random) -> None:
        super().__init__(num_blocks, block_size, VOCAB)
        self.now = 0.0
        self._machine = machine
        self._chance = chance

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        self.now += self._machine.seconds(plan, self._chance)
        return super().execute(plan)


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    request: Request


@dataclass(slots=True)
class Progress:
    """When the tokens of a request came."""

    arrival: Arrival
    times: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        return self.times[0] - self.arrival.at

    @property
    def intervals(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def simulate(
    arrivals: list[Arrival],
    limits: SchedulerLimits,
    *,
    num_blocks: int = 4096,
    block_size: int = 16,
    machine: Machine | None = None,
    seed: int = 0,
) -> list[Progress]:
    """Runs a trace, in order of arrival, to its end."""
    runner = TimedRunner(num_blocks, block_size, machine or Machine(), random.Random(seed))
    engine = Engine(
        runner,
        limits,
        max_waiting=len(arrivals),
        clock=lambda: runner.now,
        deliver=_ignore,
        fault=_ignore_keys,
    )
    progress = {arrival.request.key: Progress(arrival) for arrival in arrivals}
    upcoming = iter(arrivals)
    arrival = next(upcoming, None)
    while True:
        while arrival is not None and arrival.at <= runner.now:
            engine.submit(arrival.request)
            arrival = next(upcoming, None)
        report = engine.step()
        if report is not None:
            for sequence in report.sequences:
                progress[sequence.key].times.append(runner.now)
        elif arrival is not None:
            runner.now = arrival.at
        else:
            return list(progress.values())


def trace(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Chats of three tenants, one of which sends a burst every 40 seconds, and long documents now and then."""
    chance = random.Random(seed)
    root = prefix.root(b"trace", "", 16, "", b"")
    arrivals: list[Arrival] = []

    def add(at: float, tenant: bytes, prompt: int, new: int, priority: int = 0) -> None:
        ids = [chance.randrange(VOCAB) for _ in range(prompt)]
        request = Request(
            len(arrivals), ids, max_tokens=new, prefix_root=root, tenant=tenant, priority=priority, deadline=math.inf
        )
        arrivals.append(Arrival(at, request))

    at = 0.0
    while (at := at + chance.expovariate(rate)) < seconds:
        length = int(min(2000, chance.lognormvariate(4.5, 0.7))) + 1
        tenant = chance.choice((b"one", b"two"))
        if chance.random() < 0.04:
            add(at, tenant, 4000, 32)
        else:
            add(at, tenant, length, chance.randint(16, 96))
    for start in range(5, int(seconds), 40):
        for _ in range(16):
            add(float(start), b"burst", 200, 48)
    return sorted(arrivals, key=lambda arrival: arrival.at)


@dataclass(frozen=True, slots=True)
class Outcome:
    policy: str
    first_token_p50: float
    first_token_p99: float
    quiet_first_token_p99: float
    """Of the short requests of tenants that send no bursts."""
    interval_p50: float
    interval_p99: float
    long_first_token_p50: float


def outcome(policy: str, progress: list[Progress]) -> Outcome:
    first = [p.first_token for p in progress]
    quiet = [p.first_token for p in progress if p.arrival.request.tenant != b"burst" and _short(p)]
    intervals = [interval for p in progress for interval in p.intervals]
    return Outcome(
        policy,
        _percentile(first, 0.5),
        _percentile(first, 0.99),
        _percentile(quiet, 0.99),
        _percentile(intervals, 0.5),
        _percentile(intervals, 0.99),
        _percentile([p.first_token for p in progress if not _short(p)], 0.5),
    )


def policies() -> Iterator[tuple[str, SchedulerLimits, Callable[[Request], Request]]]:
    """Name, limits, and what a request becomes under it."""

    def alike(request: Request) -> Request:
        return Request(request.key, request.prompt_ids, max_tokens=request.max_tokens, prefix_root=request.prefix_root)

    def same(request: Request) -> Request:
        return request

    for name, target in (("adaptive", 0.0), ("100 ms", 0.1), ("200 ms", 0.2), ("400 ms", 0.4), ("no target", 1e9)):
        yield f"fair, {name}", SchedulerLimits(512, 64, step_target=target), same
    yield "first come, adaptive", SchedulerLimits(512, 64), alike
    yield "first come, no target", SchedulerLimits(512, 64, step_target=1e9), alike


def _short(progress: Progress) -> bool:
    return len(progress.arrival.request.prompt_ids) <= 2001


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


class Starved(Exception):
    """A request doesn't come to its end, or a step computes nothing."""


def live(chance: random.Random) -> int:
    """One random life of an engine with its scheduler; returns how many steps it took.

    Requests of a few tenants and priorities share prefixes, have several choices, come and are aborted at random, on a
    pool that is often too small for all. The books are verified after every step. Raises Starved, or RuntimeError.
    """
    size = chance.choice((2, 4, 8))
    most = 26 // size + 1
    limits = SchedulerLimits(
        chance.choice((1, 3, 8, 32, 512)), chance.choice((1, 2, 3, 8)), step_target=chance.choice((0.0, 0.0, 0.06, 1e9))
    )
    runner = TimedRunner(chance.randint(most, 4 * most), size, Machine(), random.Random(0))
    engine = Engine(runner, limits, max_waiting=64, clock=lambda: runner.now, deliver=_ignore, fault=_ignore_keys)
    roots = [prefix.root(b"life", "", size, "", scope) for scope in (b"one", b"two")]
    left: dict[Hashable, int] = {}
    """Choices of each request that haven't ended."""
    work = steps = 0

    def submit(key: int) -> None:
        nonlocal work
        prompt = [chance.randrange(2) for _ in range(chance.randint(1, 20))]
        count, choices = chance.randint(1, 6), chance.choice((1, 1, 1, 2, 4))
        engine.submit(
            Request(
                key,
                prompt,
                choices=((),) * choices,
                max_tokens=count,
                prefix_root=chance.choice(roots),
                use_prefix_cache=chance.random() < 0.8,
                tenant=chance.choice((b"a", b"b", b"c")),
                priority=chance.choice((-10, 0, 0, 0, 1, 10)),
                deadline=runner.now + chance.expovariate(0.05) if chance.random() < 0.2 else math.inf,
                waited=chance.choice((0.0, 0.0, chance.random() * 100)),
                suspect=chance.random() < 0.1,
            )
        )
        left[key] = choices
        work += choices * (len(prompt) + count)

    def step() -> bool:
        nonlocal steps
        report = engine.step()
        engine.scheduler.check()
        if report is None:
            return False
        steps += 1
        for sequence in report.sequences:
            if sequence.end is not None:
                left[sequence.key] -= 1
        for key in report.expired:
            left[key] = 0
        return True

    for key in range(chance.randint(1, 6)):
        submit(key)
        for _ in range(chance.randint(0, 4)):
            step()
        if chance.random() < 0.15:
            gone = chance.choice(list(left))
            engine.abort([gone])
            left[gone] = 0
    # Whoever is preempted is computed anew; but the oldest never is, so what is to do is bounded.
    bound = steps + 40 * work + 100
    while step():
        if steps > bound:
            raise Starved(f"requests {[key for key, count in left.items() if count]} don't end")
    if any(left.values()) or engine.pool.num_used:
        raise Starved(f"{left}, {engine.pool.num_used} blocks used at the end")
    return steps


def pool_operations(count: int, seed: int) -> dict[str, int]:
    """Random operations on block pools, each checked; returns how many of each. Raises RuntimeError where the books are
    broken."""
    chance = random.Random(seed)
    done = dict.fromkeys(("allocate", "publish", "describe", "share", "hit", "release", "watch"), 0)
    while sum(done.values()) < count:
        pool = BlockPool(chance.randint(1, 8), chance.choice((1, 4, 16)))
        pool.watch(chance.random() < 0.5)
        tables: list[list[int]] = []
        for _ in range(min(10_000, count - sum(done.values()))):
            name = _pool_operation(pool, tables, chance)
            done[name] += 1
            pool.check()
            if pool.num_used != len({block for table in tables for block in table}):
                raise RuntimeError("the pool counts other blocks as used than are")
    return done


def _pool_operation(pool: BlockPool, tables: list[list[int]], chance: random.Random) -> str:
    name = chance.choice(("allocate", "publish", "publish", "describe", "share", "hit", "release", "release", "watch"))
    used = [table for table in tables if table]
    if name == "allocate" or (name in ("publish", "describe", "share") and not used) or not tables:
        tables.append(pool.allocate(chance.randint(0, min(4, pool.num_available))))
        return "allocate"
    match name:
        case "publish":
            pool.publish(chance.choice(chance.choice(used)), chance.randbytes(1))
        case "describe":
            ids = [chance.randrange(2) for _ in range(pool.block_size)]
            pool.describe(chance.choice(chance.choice(used)), chance.randbytes(1), ids)
        case "share":
            table = chance.choice(used)
            shared = table[: chance.randint(0, len(table))]
            for block in shared:
                pool.seal(block)
            pool.acquire(shared)
            tables.append(shared)
        case "hit":
            blocks = list(dict.fromkeys(pool.lookup(chance.randbytes(1) for _ in range(3))))
            pool.acquire(blocks)
            tables.append(blocks)
        case "release":
            pool.release(tables.pop(chance.randrange(len(tables))))
        case "watch":
            pool.take_changes()
    return name


def _ignore(report: StepReport) -> None:
    """Whoever steps an engine reads what `step` returns."""


def _ignore_keys(keys: list[Hashable]) -> None:
    """A fault is raised by `step` as well."""


@click.group()
def main() -> None:
    """The scheduler without a model."""


@main.command("trace")
@click.option("--rate", default=0.5, help="Requests a second, bursts aside.")
@click.option("--seconds", default=120.0)
@click.option("--seed", default=0)
@click.option("--json", "as_json", is_flag=True)
def trace_command(rate: float, seconds: float, seed: int, as_json: bool) -> None:
    """Compares policies on one trace."""
    arrivals = trace(rate, seconds, seed)
    if not as_json:
        print(f"{len(arrivals)} requests; seconds, simulated")
        print(f"{'policy':>22} {'TTFT p50':>9} {'p99':>7} {'quiet p99':>10} {'long p50':>9} {'interval':>9} {'p99':>6}")
    for name, limits, become in policies():
        progress = simulate([Arrival(a.at, become(a.request)) for a in arrivals], limits)
        for item, arrival in zip(progress, arrivals, strict=True):
            item.arrival = arrival  # what is told of tenants is told under policies that know none, too
        result = outcome(name, progress)
        if as_json:
            print(json.dumps(asdict(result)))
            continue
        print(
            f"{name:>22} {result.first_token_p50:>9.2f} {result.first_token_p99:>7.2f} "
            f"{result.quiet_first_token_p99:>10.2f} {result.long_first_token_p50:>9.2f} {result.interval_p50:>9.3f} "
            f"{result.interval_p99:>6.3f}",
            flush=True,
        )


@main.command("lives")
@click.option("--count", default=100_000)
@click.option("--seed", default=0)
def lives_command(count: int, seed: int) -> None:
    """Lives engines at random; fails where one starves a request or breaks the books."""
    started, steps = time.monotonic(), 0
    for number in range(count):
        try:
            steps += live(random.Random(seed + number))
        except (Starved, RuntimeError) as error:
            print(f"life {seed + number}: {error}")
            sys.exit(1)
    print(f"{count} lives, {steps} steps, every one checked, none starved: {time.monotonic() - started:.0f} s")


@main.command("pool")
@click.option("--operations", default=10_000_000)
@click.option("--seed", default=0)
def pool_command(operations: int, seed: int) -> None:
    """Operates block pools at random; fails where the books are broken."""
    started = time.monotonic()
    try:
        done = pool_operations(operations, seed)
    except RuntimeError as error:
        print(error)
        sys.exit(1)
    told = ", ".join(f"{count} {name}" for name, count in done.items())
    print(f"{operations} operations, every one checked: {told}; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
