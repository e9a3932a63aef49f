"""The workers a router knows, which models they serve, and which of them takes a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc

from qwire.errors import QwireError, Reason
from qwire.v1 import models_pb2
from router.worker_link import WorkerLink


class Fleet:
    """All worker links of the router."""

    def __init__(self, links: list[WorkerLink], worker_wait: float) -> None:
        self.links = links
        self._worker_wait = worker_wait

    def models(self) -> list[models_pb2.ModelInfo]:
        """Models of the workers linked now or before, by name."""
        found = {link.info.model.name: link.info.model for link in self.links if link.info is not None}
        return [found[name] for name in sorted(found)]

    def model(self, name: str) -> models_pb2.ModelInfo:
        """The model of that name, or the only one if the name is empty. Raises QwireError NOT_FOUND."""
        models = self.models()
        for model in models:
            if model.name == name or (not name and len(models) == 1):
                return model
        if not name and models:
            message = "model must be set: more than one is served"
        else:
            message = "no model of that name is served"
        raise QwireError(grpc.StatusCode.NOT_FOUND, message, reason=Reason.MODEL_NOT_FOUND)

    async def find_model(self, name: str) -> models_pb2.ModelInfo:
        """As `model`, but waits a bounded time while no worker has ever been linked. Raises QwireError."""
        if not self.models():
            await self._until_ready(lambda link: True)
        return self.model(name)

    async def place(self, model: str) -> WorkerLink:
        """The least loaded ready worker of a model; waits a bounded time for one. Raises QwireError UNAVAILABLE."""

        def serves(link: WorkerLink) -> bool:
            return link.info is not None and link.info.model.name == model

        await self._until_ready(serves)
        return min((link for link in self.links if link.ready and serves(link)), key=lambda link: link.streams)

    async def _until_ready(self, wanted: Callable[[WorkerLink], bool]) -> None:
        deadline = time.monotonic() + self._worker_wait
        while not any(link.ready and wanted(link) for link in self.links):
            left = deadline - time.monotonic()
            if left <= 0:
                raise QwireError(
                    grpc.StatusCode.UNAVAILABLE, "no worker is ready", reason=Reason.NO_WORKER, retry_after=1.0
                )
            waits = [asyncio.create_task(link.changed.wait()) for link in self.links]
            try:
                await asyncio.wait(waits, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    @property
    def any_ready(self) -> bool:
        return any(link.ready for link in self.links)
