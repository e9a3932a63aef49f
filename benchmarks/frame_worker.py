"""A worker that is nothing but its link: `python -m benchmarks.frame_worker serve ...`.

For loads past what a fake worker's engine can do on the core that it shares with the clients.

It takes every submit, and sends what an engine would: one frame a step, with one id for each of its sequences.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import click
import grpc

from benchmarks.stamping_worker import stamp
from qwire.service.config import command
from qwire.service.server import Listener, Server, run, until_signal
from qwire.v1 import worker_pb2 as pb
from qwire.v1 import worker_pb2_grpc
from worker.fake.__main__ import describe
from worker.fake.config import FakeWorkerConfig

HEARTBEAT_SECONDS = 0.5
Context = grpc.aio.ServicerContext[Any, Any]


class FrameWorker(worker_pb2_grpc.WorkerServiceServicer):
    """WorkerService without an engine, for one router."""

    def __init__(self, config: FakeWorkerConfig) -> None:
        self._info = describe(config)
        self._step_seconds = config.step_ms / 1e3

    async def GetWorkerInfo(self, request: pb.GetWorkerInfoRequest, context: Context) -> pb.GetWorkerInfoResponse:
        return pb.GetWorkerInfoResponse(info=self._info)

    async def WatchCache(self, request: pb.WatchCacheRequest, context: Context) -> AsyncIterator[pb.WatchCacheResponse]:
        yield pb.WatchCacheResponse(snapshot=True, snapshot_end=True)
        await asyncio.Event().wait()

    async def Serve(
        self, request_iterator: AsyncIterator[pb.ServeRequest], context: Context
    ) -> AsyncIterator[pb.ServeResponse]:
        frames: asyncio.Queue[pb.ServeResponse] = asyncio.Queue(1024)
        running: dict[int, int] = {}
        tasks = [
            asyncio.create_task(self._read(request_iterator, running, frames)),
            asyncio.create_task(self._step(running, frames)),
        ]
        try:
            yield pb.ServeResponse(welcome=pb.Welcome(info=self._info))
            while True:
                yield await frames.get()
        finally:
            for task in tasks:
                task.cancel()

    async def _read(
        self,
        requests: AsyncIterator[pb.ServeRequest],
        running: dict[int, int],
        frames: asyncio.Queue[pb.ServeResponse],
    ) -> None:
        async for request in requests:
            for submit in [request.submit] if request.HasField("submit") else request.submits.submits:
                running[submit.attempt] = 0
                await frames.put(pb.ServeResponse(admitted=pb.Admitted(attempt=submit.attempt)))
            for attempt in request.abort.attempts:
                running.pop(attempt, None)

    async def _step(self, running: dict[int, int], frames: asyncio.Queue[pb.ServeResponse]) -> None:
        loop = asyncio.get_running_loop()
        due, number = loop.time(), 0
        while True:
            due = max(due + self._step_seconds, loop.time())
            await asyncio.sleep(due - loop.time())
            number += 1
            ids = [stamp()]
            sequences = [
                pb.SequenceStep(attempt=attempt, token_index=index, token_ids=ids) for attempt, index in running.items()
            ]
            for attempt in running:
                running[attempt] += 1
            step = pb.Step(number=number, sequences=sequences, load=pb.Load(running=len(running)))
            await frames.put(pb.ServeResponse(step=step))


async def serve(config: FakeWorkerConfig) -> int:
    server = Server(Listener(config.listen), max_message_bytes=4 * 1024 * 1024)
    name = pb.DESCRIPTOR.services_by_name["WorkerService"].full_name
    server.add(worker_pb2_grpc.add_WorkerServiceServicer_to_server, FrameWorker(config), name)
    await server.start()
    await server.set_serving(True)
    await until_signal()
    await server.stop(0)
    return 0


@click.group()
def main() -> None:
    """A worker that is nothing but its link."""


main.add_command(command(FakeWorkerConfig, lambda config: run(lambda: serve(config)), service="fake_worker"))

if __name__ == "__main__":
    sys.exit(main(prog_name="python -m benchmarks.frame_worker"))
