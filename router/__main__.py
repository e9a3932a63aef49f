"""`python -m router serve`: the router's process."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from functools import partial

import click

from qwire.service.accepts import Refusals
from qwire.service.config import command
from qwire.service.server import Listener, Server, run, until_signal
from qwire.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from router.admission import Admission
from router.block_index import MAX_WORKERS, BlockIndex
from router.cache_index import CacheIndex
from router.config import RouterConfig
from router.faces import AdminServicer, ModelServicer, TokenizerServicer
from router.fleet import Fleet
from router.generation import QUEUED_METHODS, GenerationServicer
from router.placement import POLICIES
from router.tokenizer_link import TokenizerLink
from router.vetting import objection
from router.worker_link import WorkerLink

log = logging.getLogger(__name__)

HEALTH_LOOK_SECONDS = 0.05


async def serve(config: RouterConfig) -> int:
    """Runs the router until it is told to stop; returns the exit status."""
    tokenizer = TokenizerLink(config.tokenizer)
    router_id = uuid.uuid4().hex
    tables = [BlockIndex() for _ in range(0, len(config.worker), MAX_WORKERS)]
    links = [
        WorkerLink(target, router_id, tokenizer.send, CacheIndex(tables[number // MAX_WORKERS], number % MAX_WORKERS))
        for number, target in enumerate(config.worker)
    ]
    fleet = Fleet(links, config.worker_wait, POLICIES[config.placement])
    admission = Admission(fleet, config.limits, config.tenant_limits, time.monotonic)
    for link in links:
        link.on_room = admission.serve_soon
        link.object = partial(objection, digest=tokenizer.digest)
    generation = GenerationServicer(config, fleet, admission, tokenizer)

    public = Server(
        Listener(config.listen, config.insecure_bind),
        max_message_bytes=config.max_request_bytes,
        write_timeout=config.write_timeout,
        refusals=Refusals(QUEUED_METHODS, generation.refuse),
        # More concurrent calls than streams: those over the limit get a typed answer instead of waiting unseen.
        options=[("grpc.max_concurrent_streams", 4 * config.max_streams)],
    )
    public.add(
        generation_pb2_grpc.add_GenerationServiceServicer_to_server,
        generation,
        _name(generation_pb2, "GenerationService"),
    )
    public.add(
        models_pb2_grpc.add_ModelServiceServicer_to_server, ModelServicer(fleet), _name(models_pb2, "ModelService")
    )
    public.add(
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server,
        TokenizerServicer(config, tokenizer),
        _name(tokenizer_pb2, "TokenizerService"),
    )
    servers = [public]
    if config.admin_listen:
        admin = Server(
            Listener(config.admin_listen, config.insecure_bind),
            max_message_bytes=config.max_request_bytes,
            announce=False,
        )
        admin.add(
            admin_pb2_grpc.add_AdminServiceServicer_to_server,
            AdminServicer(fleet, admission, lambda: generation.active_streams),
            _name(admin_pb2, "AdminService"),
        )
        servers.append(admin)

    background = [asyncio.create_task(link.run()) for link in links]
    background.append(asyncio.create_task(tokenizer.run()))
    background.append(asyncio.create_task(generation.flow.run()))
    health = asyncio.create_task(_follow_health(fleet, servers, config.worker_wait))
    background.append(health)
    stopping = asyncio.Event()
    broken: list[BaseException] = []

    def on_done(task: asyncio.Task[None]) -> None:
        # A router whose link nobody tends any more would look well and serve nothing.
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a link broke; the process ends", exc_info=error)
            broken.append(error)
            stopping.set()

    for task in background:
        task.add_done_callback(on_done)
    for server in servers:
        await server.start()
    await until_signal(stopping)
    health.cancel()
    for server in servers:
        await server.leave()
    await asyncio.sleep(config.drain_delay if not broken else 0)
    log.info("draining: %d streams have up to %g s", generation.active_streams, config.grace)
    await asyncio.gather(*(server.stop(config.grace) for server in servers))
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    await tokenizer.close()
    return 1 if broken else 0


async def _follow_health(fleet: Fleet, servers: list[Server], worker_wait: float) -> None:
    """SERVING from the first linked worker on, but for times in which none was ready for longer than calls wait."""
    serving, last_ready = False, 0.0
    while True:
        now = time.monotonic()
        if fleet.any_ready:
            last_ready = now
        wanted = fleet.any_ready or (serving and now - last_ready <= worker_wait)
        if wanted != serving:
            serving = wanted
            for server in servers:
                await server.set_serving(serving)
        await asyncio.sleep(HEALTH_LOOK_SECONDS)


def _name(module: object, service: str) -> str:
    return str(module.DESCRIPTOR.services_by_name[service].full_name)  # type: ignore[attr-defined]


@click.group()
def main() -> None:
    """The router."""


main.add_command(command(RouterConfig, lambda config: run(lambda: serve(config), batch=True), service="router"))

if __name__ == "__main__":
    main(prog_name="python -m router")
