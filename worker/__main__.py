"""`python -m worker serve|convert`: the worker's process."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

import click
import torch

from qwire.service.config import EXIT_UNUSABLE_MODEL, ConfigError, command
from qwire.service.server import Listener, Server, run, until_signal
from qwire.v1 import worker_pb2, worker_pb2_grpc
from worker.config import WorkerConfig
from worker.convert import convert_command
from worker.engine.engine import Engine
from worker.engine.scheduler import SchedulerLimits
from worker.face import WorkerFace
from worker.identity import describe
from worker.model import ModelConfig, ModelError
from worker.runner.runner import TorchRunner, kv_bytes_per_block

log = logging.getLogger(__name__)

MAX_SUBMIT_BYTES = 4 * 1024 * 1024
FAULT_FLUSH_SECONDS = 0.5


def load(config: WorkerConfig) -> TorchRunner:
    """Loads the model and makes room for its KV cache. Raises ModelError or ConfigError."""
    if config.threads:
        torch.set_num_threads(config.threads)
    started = time.monotonic()
    block_bytes = kv_bytes_per_block(ModelConfig.read(config.model), config.dtype, config.block_size)
    num_blocks = config.kv_blocks or config.kv_cache_mib * 1024 * 1024 // block_bytes
    if num_blocks < 1:
        raise ConfigError(f"--kv-cache-mib: one block takes {block_bytes} bytes")
    runner = TorchRunner(config.model, num_blocks=num_blocks, block_size=config.block_size, dtype=config.dtype)
    log.info(
        "loaded %s in %.1f s: %s on the reference kernels (torch %s, %s), %d threads, %d KV blocks of %d (%d MiB)",
        config.name,
        time.monotonic() - started,
        runner.dtype,
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        num_blocks,
        config.block_size,
        num_blocks * block_bytes // 2**20,
    )
    return runner


async def serve(config: WorkerConfig) -> int:
    """Runs the worker until it is told to stop or a step fails; returns the exit status."""
    listener = Listener(config.listen, config.insecure_bind)
    listener.check()
    try:
        runner = load(config)
        info = describe(config, runner)
    except ModelError as error:
        log.error("can't serve %s: %s", config.model, error)
        return EXIT_UNUSABLE_MODEL
    face = WorkerFace(info)
    engine = Engine(
        runner,
        SchedulerLimits(config.max_step_tokens, config.max_running),
        max_waiting=config.max_waiting,
        clock=time.monotonic,
        deliver=face.deliver,
        fault=face.fault,
    )
    face.attach(engine)
    server = Server(listener, max_message_bytes=MAX_SUBMIT_BYTES)
    server.add(
        worker_pb2_grpc.add_WorkerServiceServicer_to_server,
        face,
        worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,
    )
    await server.start()
    engine.start()
    await server.set_serving(True)
    stopping = asyncio.create_task(until_signal())
    faulted = asyncio.create_task(face.faulted.wait())
    await asyncio.wait([stopping, faulted], return_when=asyncio.FIRST_COMPLETED)
    if face.faulted.is_set():
        await asyncio.sleep(FAULT_FLUSH_SECONDS)  # let the routers read which requests it was
        return 1
    log.info("draining")
    faulted.cancel()
    await server.set_serving(False)
    await face.drain(config.grace)
    await server.stop(grace=1.0)
    await asyncio.to_thread(engine.stop)
    return 0


@click.group()
def main() -> None:
    """A worker: the model, its KV cache and the step loop."""


main.add_command(command(WorkerConfig, lambda config: run(lambda: serve(config)), service="worker"))
main.add_command(convert_command, "convert")

if __name__ == "__main__":
    sys.exit(main(prog_name="python -m worker"))
