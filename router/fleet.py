"""The workers a router knows, which models they serve, and which of them takes a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import grpc

from qwire import prefix
from qwire.errors import QwireError, Reason
from qwire.v1 import models_pb2
from qwire.v1 import worker_pb2 as pb
from router.admission import Wanted
from router.block_index import BlockIndex, keys_of
from router.placement import Candidate, Policy
from router.worker_link import WorkerLink

NONE_REFUSED: Mapping[WorkerLink, QwireError] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request goes."""

    link: WorkerLink
    worker: pb.WorkerInfo
    uncached_tokens: int
    """Prompt tokens that the worker has to compute, as far as the router knows: what the request counts there."""


class AllFull(Exception):
    """Every worker that could take a request has as many as it takes, or has refused it."""


class Fleet:
    """All worker links of the router.

    Args:
        worker_wait: seconds that a call waits for a worker when none is ready.
        policy: makes what chooses among a model's workers.
    """

    def __init__(self, links: list[WorkerLink], worker_wait: float, policy: Callable[[], Policy]) -> None:
        self.links = links
        self._worker_wait = worker_wait
        self._policy = policy
        self._policies: dict[str, Policy] = {}
        """One a model, or the turns of one would be taken by another."""

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

    def known_model(self, name: str) -> str:
        """The name of the model that a request asks for; empty where that isn't known, or is nothing served."""
        names = dict.fromkeys(link.info.model.name for link in self.links if link.info is not None)
        if name:
            return name if name in names else ""
        return next(iter(names)) if len(names) == 1 else ""

    def room(self, wanted: Wanted) -> int | None:
        """Requests that its ready workers would still take; None where none is ready."""
        links = [link for link in self.links if link.ready and _fits(link, wanted)]
        return sum(link.room for link in links) if links else None

    def prefill_seconds(self, model: str, tokens: float) -> float:
        """How long its ready workers take to compute what they have and so many prompt tokens more; 0 if unknown."""
        rate, pending = 0.0, tokens
        for link in self.links:
            if link.ready and link.info is not None and link.info.model.name == model:
                if not link.load.prefill_tokens_per_second:
                    return 0.0
                rate += link.load.prefill_tokens_per_second
                pending += link.pending_tokens
        return pending / rate if rate else 0.0

    async def place(
        self,
        model: str,
        prompt_ids: Sequence[int],
        scope: bytes,
        *,
        needs: frozenset[pb.Feature.ValueType] = frozenset(),
        bypass: bool = False,
        numerics_id: str = "",
        moved: bool = False,
        refused: Mapping[WorkerLink, QwireError] = NONE_REFUSED,
    ) -> Place:
        """Chooses a ready worker of a model, after a bounded wait for one. Nothing may be awaited between this and the
        submit, or others choose without knowing of it.

        Args:
            prompt_ids: what is to be computed, ids generated before included.
            scope: whose requests share cached blocks.
            needs: features that the worker must have.
            bypass: the request leaves the prefix cache alone.
            numerics_id: what the worker's must be; empty for any.
            moved: the request had a place before, which a full worker gives it too.
            refused: workers that have refused it, and how.

        Raises:
            QwireError: UNAVAILABLE where none gets ready, or what the last of those said that refused it where there
                are no others.
            AllFull: none has room.
        """

        asked = Wanted(model, needs, numerics_id)

        def wanted(link: WorkerLink) -> bool:
            return _fits(link, asked)

        self._refuse_what_none_has(model, needs)
        await self._until_ready(wanted, equivalent=bool(numerics_id))
        if refused and all(link in refused for link in self.links if link.ready and wanted(link)):
            raise list(refused.values())[-1]
        open_links = {
            index: (link, link.info)
            for index, link in enumerate(self.links)
            if link.info is not None
            and link.ready
            and (moved or not link.full)
            and wanted(link)
            and link not in refused
        }
        cached = {} if bypass else _cached_tokens(open_links, prompt_ids, scope)
        candidates = [
            Candidate(index, link.streams, link.pending_tokens, info.max_running, cached.get(index, 0))
            for index, (link, info) in open_links.items()
        ]
        if not candidates:
            raise AllFull
        policy = self._policies.setdefault(model, self._policy())
        chosen = policy.choose(candidates, len(prompt_ids))
        link = self.links[chosen.index]
        if link.info is None:
            raise RuntimeError("a ready link has no worker")
        return Place(link, link.info, len(prompt_ids) - chosen.cached_tokens)

    def _refuse_what_none_has(self, model: str, needs: frozenset[pb.Feature.ValueType]) -> None:
        """Raises QwireError where a model has workers, of another release perhaps, and none has all features."""
        links = [link for link in self.links if _fits(link, Wanted(model))]
        if not links or any(_fits(link, Wanted(model, needs)) for link in links):
            return
        had = {feature for link in links if link.info is not None for feature in link.info.features}
        lacking = sorted(needs - had) or sorted(needs)
        raise QwireError(
            grpc.StatusCode.UNIMPLEMENTED,
            f"no worker of the model has {' and '.join(map(pb.Feature.Name, lacking))}",
            reason=Reason.NOT_IN_THIS_RELEASE,
        )

    async def _until_ready(self, wanted: Callable[[WorkerLink], bool], *, equivalent: bool = False) -> None:
        deadline = time.monotonic() + self._worker_wait
        while not any(link.ready and wanted(link) for link in self.links):
            left = deadline - time.monotonic()
            if left <= 0:
                raise QwireError(
                    grpc.StatusCode.UNAVAILABLE,
                    "no worker is ready that gives the same tokens" if equivalent else "no worker is ready",
                    reason=Reason.NO_EQUIVALENT_WORKER if equivalent else Reason.NO_WORKER,
                    retry_after=1.0,
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


def _fits(link: WorkerLink, wanted: Wanted) -> bool:
    """Whether the worker serves the model and has what a request needs, now or when it was last linked."""
    info = link.info
    return (
        info is not None
        and info.model.name == wanted.model
        and (not wanted.needs or wanted.needs <= set(info.features))
        and (not wanted.numerics_id or info.model.numerics_id == wanted.numerics_id)
    )


def prefix_root(worker: pb.WorkerInfo, scope: bytes) -> bytes:
    """What the block hashes of a scope's prompts start from at a worker."""
    return prefix.root(worker.model_fingerprint, worker.kv_dtype, worker.block_size, "", scope)


def _cached_tokens(
    links: Mapping[int, tuple[WorkerLink, pb.WorkerInfo]], ids: Sequence[int], scope: bytes
) -> dict[int, int]:
    """How many tokens of a prompt each worker's cache holds. The last token is always computed.

    A chain of blocks is hashed once a profile, and looked up once in each table for all workers that have it there.
    """
    groups: dict[tuple[bytes, str, int], dict[BlockIndex, dict[int, int]]] = {}
    for index, (link, info) in links.items():
        if len(link.cache):
            profile = (info.model_fingerprint, info.kv_dtype, info.block_size)
            groups.setdefault(profile, {}).setdefault(link.cache.blocks, {})[link.cache.worker] = index
    cached = {}
    for (_, _, block_size), tables in groups.items():
        if len(ids) <= block_size:
            continue
        _, info = links[next(iter(next(iter(tables.values())).values()))]
        hashes = prefix.block_hashes(prefix_root(info, scope), ids[: len(ids) - 1], block_size)
        keys = keys_of(b"".join(hashes))
        for blocks, workers in tables.items():
            for worker, count in blocks.leading(keys, workers).items():
                cached[workers[worker]] = count * block_size
    return cached
