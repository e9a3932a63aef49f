"""`python -m worker.fake serve`: a fake worker's process."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
import uuid
from pathlib import Path

import click

from qwire.service.config import command
from qwire.service.server import Listener, run, until_signal
from qwire.v1 import models_pb2
from qwire.v1 import worker_pb2 as pb
from worker.engine.engine import Engine
from worker.engine.scheduler import SchedulerLimits
from worker.face import FAULT_FLUSH_SECONDS, WorkerFace, server_of
from worker.fake.config import FakeWorkerConfig
from worker.fake.runner import FakeRunner, StepCost

KV_DTYPE = "fake"


def describe(config: FakeWorkerConfig) -> pb.WorkerInfo:
    """What routers are told. Raises ConfigError where the model's folder can't be read."""
    model, generation = config.file("config.json"), config.file("generation_config.json")
    eos = generation.get("eos_token_id", model.get("eos_token_id", []))
    vocab_size = int(model.get("vocab_size", config.vocab_size))
    positions = int(model.get("max_position_embeddings", config.context_length))
    tokenizer = Path(config.model) / "tokenizer.json"
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if config.model and tokenizer.exists() else ""
    fingerprint = hashlib.sha256(f"qwire fake worker 1\0{vocab_size}".encode())
    return pb.WorkerInfo(
        worker_id=config.id,
        boot_id=uuid.uuid4().hex,
        model=models_pb2.ModelInfo(
            name=config.name,
            architecture="fake",
            context_length=min(positions, config.kv_blocks * config.block_size),
            vocab_size=vocab_size,
            dtype=KV_DTYPE,
            quantization="none",
            capabilities=[models_pb2.CAPABILITY_GENERATE, models_pb2.CAPABILITY_CHAT],
            default_sampling=models_pb2.DefaultSampling(temperature=1.0, top_p=1.0, repetition_penalty=1.0),
            eos_token_ids=[eos] if isinstance(eos, int) else eos,
            tokenizer_digest=digest,
            numerics_id=fingerprint.hexdigest(),
        ),
        block_size=config.block_size,
        num_blocks=config.kv_blocks,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        features=[
            pb.FEATURE_SAMPLING,
            pb.FEATURE_PENALTIES,
            pb.FEATURE_LOGPROBS,
            pb.FEATURE_CHOICES,
            pb.FEATURE_SUBMITS,
        ],
        backend="fake",
        model_fingerprint=fingerprint.digest(),
        kv_dtype=KV_DTYPE,
    )


async def serve(config: FakeWorkerConfig, runner: type[FakeRunner] = FakeRunner) -> int:
    """Runs the worker until it is told to stop or a step fails; returns the exit status. Raises ConfigError."""
    info = describe(config)
    face = WorkerFace(info)
    engine = Engine(
        runner(
            config.kv_blocks,
            config.block_size,
            info.model.vocab_size,
            StepCost(config.step_ms / 1e3, config.token_us / 1e6),
        ),
        SchedulerLimits(config.max_step_tokens, config.max_running),
        max_waiting=config.max_waiting,
        clock=time.monotonic,
        deliver=face.deliver,
        fault=face.fault,
    )
    face.attach(engine)
    server = server_of(face, Listener(config.listen, config.insecure_bind))
    await server.start()
    engine.start()
    await server.set_serving(True)
    watching = asyncio.create_task(face.watch_steps())
    ends = [asyncio.create_task(until_signal()), asyncio.create_task(face.faulted.wait())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    await server.set_serving(False)
    if not face.faulted.is_set():
        await face.drain(config.grace)
    for task in (watching, *ends):
        task.cancel()
    if face.faulted.is_set():
        await face.end_links(FAULT_FLUSH_SECONDS)
        await server.stop(grace=0.1)
        return 1
    await server.stop(grace=1.0)
    await asyncio.to_thread(engine.stop)
    return 0


@click.group()
def main() -> None:
    """A worker without a model."""


main.add_command(command(FakeWorkerConfig, lambda config: run(lambda: serve(config)), service="fake_worker"))

if __name__ == "__main__":
    sys.exit(main(prog_name="python -m worker.fake"))
