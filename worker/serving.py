"""A worker's processes: the launcher, and from start to end the ranks that it forks."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from dataclasses import asdict, dataclass, replace

from qwire.service.config import EXIT_CONFIGURATION, EXIT_UNUSABLE_MODEL, ConfigError
from qwire.service.server import Listener, run, until_signal
from worker.config import WorkerConfig
from worker.constraints.grammars import Grammars
from worker.engine.engine import Engine
from worker.engine.scheduler import SchedulerLimits
from worker.face import FAULT_FLUSH_SECONDS, WorkerFace, server_of
from worker.identity import describe, read_digests
from worker.kernels import pin_threads, usable_cpus
from worker.loading import connect, gather_pages_later, load, threads_of
from worker.model import (
    ModelConfig,
    ModelError,
    WeightsDigest,
    check_shares,
    check_stages,
    resolve_quantization,
    weights_state,
)
from worker.parallel import LOST, Group, GroupError, Place, run_ranks
from worker.runner.parallel import ParallelRunner, follow
from worker.runner.runner import TorchRunner

log = logging.getLogger(__name__)

FAULT_SECONDS = 0.4
"""For a step to raise after a rank has died: its connections break at once."""

FINAL_STATUSES = (EXIT_CONFIGURATION, EXIT_UNUSABLE_MODEL)
"""Exit statuses of ranks that another start would end with as well."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a group of ranks leaves to the next one, by way of the launcher."""

    address: str = ""
    """Where it served: port 0 has become a port that routers know."""
    weights: str = ""
    """The digest of the weights, while the state of their files is `weights_state`."""
    weights_state: str = ""

    @classmethod
    def read(cls, place: Place) -> Remembered:
        return cls(**json.loads(place.remembered)) if place.remembered else cls()

    def leave(self, place: Place) -> None:
        place.remember(json.dumps(asdict(self)))


def launch(config: WorkerConfig, weights: WeightsDigest) -> None:
    """Runs the ranks until one of them ends the worker; exits with the worker's status. Raises ConfigError.

    Args:
        weights: of the model's folder, however much of it is read.
    """
    Listener(config.listen, config.insecure_bind).check()
    try:
        model = ModelConfig.read(config.model)
    except ModelError as error:
        log.error("can't serve %s: %s", config.model, error)
        sys.exit(EXIT_UNUSABLE_MODEL)
    try:
        check_shares(model, config.tp)
    except ModelError as error:
        raise ConfigError(f"--tp: {error}") from error
    try:
        check_stages(model, config.pp)
    except ModelError as error:
        raise ConfigError(f"--pp: {error}") from error
    try:
        resolve_quantization(model, config.quantize)
    except ModelError as error:
        raise ConfigError(f"--{error}") from error
    sys.exit(run_ranks(config.tp * config.pp, lambda place: rank_main(config, weights, place), final=FINAL_STATUSES))


def rank_main(config: WorkerConfig, weights: WeightsDigest, place: Place) -> int:
    """One rank from start to end; returns its exit status."""
    remembered = Remembered.read(place)
    if remembered.address:
        config = replace(config, listen=remembered.address)
    group = Group(place.rank, config.tp, config.pp)
    try:
        if place.rank == 0:
            run(lambda: serve(config, weights, place, group, remembered))
        runner = load(config, group)
        connect(config, group, place, runner)
        gather_pages_later(runner)
        follow(runner, group)
    except ModelError as error:
        log.error("can't serve %s: %s", config.model, error)
        return EXIT_UNUSABLE_MODEL
    except ConfigError as error:
        log.error("%s", error)
        return EXIT_CONFIGURATION
    except GroupError as error:
        log.error("rank %d has lost its group: %s", place.rank, error)
        return 1
    return 0


async def serve(
    config: WorkerConfig, weights: WeightsDigest, place: Place, group: Group, remembered: Remembered
) -> int:
    """Rank 0: runs the worker until it is told to stop or a step fails; returns the exit status.

    Raises ModelError, ConfigError, and GroupError where the ranks don't come together.
    """
    state = weights_state(config.model)
    known = remembered.weights if remembered.weights_state == state else None
    model = ModelConfig.read(config.model)
    loop, reading = asyncio.get_running_loop(), asyncio.Event()

    def on_reading() -> None:
        loop.call_soon_threadsafe(reading.set)

    loaded = asyncio.gather(
        asyncio.to_thread(load, config, group, on_reading),
        asyncio.to_thread(read_digests, config.model, known or weights),
    )
    loaded.add_done_callback(lambda _: reading.set())
    # Grammars keep Python's lock for a second or two. Reading and packing weights takes about as long, and no lock.
    await reading.wait()
    if loaded.done():
        await loaded  # raises what went wrong before there were weights to read
    grammars = Grammars.of(config.model, model.vocab_size, model.eos_token_ids)
    runner, digests = await loaded
    connect(config, group, place, runner)
    info = describe(config, runner, digests, constraints=grammars is not None)
    lost = asyncio.Event()
    ranks = _leader(config, runner, group, lost) if group.size > 1 else None
    face = WorkerFace(info, grammars)
    engine = Engine(
        ranks or runner,
        SchedulerLimits(
            config.max_step_tokens,
            config.max_running,
            step_target=config.step_target_ms / 1000,
            window=runner.window,
            max_draft_tokens=config.speculation,
            positions_ahead=runner.positions_ahead,
        ),
        max_waiting=config.max_waiting,
        clock=time.monotonic,
        deliver=face.deliver,
        fault=face.fault,
        check_steps=config.check_steps,
    )
    face.attach(engine)
    server = server_of(face, Listener(config.listen, config.insecure_bind), announce=False)
    address = await server.start()
    # Before anyone can know the address, or a group that dies now would leave it behind.
    Remembered(address, digests.weights, state).leave(place)
    print(f"listening on {address}", flush=True)  # noqa: T201 - read by whoever started us
    if group.size == 1 and threads_of(config, group) == len(usable_cpus()):
        # Threads that have all CPUs for themselves stay on them; others might be put on top of another process's. The
        # engine's is the next to call a kernel.
        pin_threads(runner.kernels, usable_cpus())
    engine.start()
    gather_pages_later(runner)
    await server.set_serving(True)
    watching = asyncio.create_task(face.watch_steps())
    stopping = asyncio.create_task(until_signal())
    faulted = asyncio.create_task(face.faulted.wait())
    losing = asyncio.create_task(lost.wait())
    await asyncio.wait([stopping, faulted, losing], return_when=asyncio.FIRST_COMPLETED)
    await server.set_serving(False)
    if lost.is_set():
        if engine.seconds_in_step():
            await asyncio.wait([faulted], timeout=FAULT_SECONDS)
        if not face.faulted.is_set():
            return 1  # between steps: no request is to blame
    if not face.faulted.is_set():
        log.info("draining")
        await face.drain(config.grace)
    faulted.cancel()
    watching.cancel()
    if face.faulted.is_set():
        await face.end_links(FAULT_FLUSH_SECONDS)
        await server.stop(grace=0.1)
        return 1
    await server.stop(grace=1.0)
    await asyncio.to_thread(engine.stop)
    if grammars is not None:
        await grammars.close()
    if ranks is not None:
        await asyncio.to_thread(ranks.stop)
    return 0


def _leader(config: WorkerConfig, runner: TorchRunner, group: Group, lost: asyncio.Event) -> ParallelRunner:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(LOST, lost.set)

    def on_lost() -> None:
        loop.call_soon_threadsafe(lost.set)

    return ParallelRunner(runner, group, timeout=config.collective_timeout, on_lost=on_lost)
