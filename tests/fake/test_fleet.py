"""Fake workers as processes: what is killed moves and gives the same ids, and routers are served alike."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from qwire import AsyncClient
from tests.helpers.fleets import Fleet, fake_fleet
from worker.fake import continuation

VOCAB = 32_000


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    flags = ("--step-ms", "5", "--max-running", "16", "--max-waiting", "64")
    with fake_fleet(tmp_path_factory.mktemp("fleet"), workers=2, routers=2, worker_flags=flags) as fleet:
        yield fleet


def options(number: int, tokens: int) -> dict[str, Any]:
    return {
        "token_ids": [number, 1, 2],
        "seed": number + 1,
        "temperature": 1.0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "text": False,
    }


def expected(number: int, tokens: int) -> list[int]:
    return continuation([number, 1, 2], tokens, VOCAB, seed=number + 1)


async def test_several_routers_are_served_alike(fleet: Fleet) -> None:
    """Both ask for three times as much as the workers run at once: neither has to wait for the other's end."""
    order: list[int] = []

    async def ask(router: int, client: AsyncClient, number: int) -> None:
        generation = await client.generate(**options(number, 40)).read()
        assert generation.token_ids == expected(number, 40)
        order.append(router)

    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(fleet.services[name].address)) for name in fleet.named("router")
        ]
        for client in clients:  # connected, so that all ask at once: who comes first is served first
            await client.generate(**options(0, 1)).read()
        await asyncio.gather(*(ask(router, clients[router], number) for number in range(48) for router in (0, 1)))
    first_half = order[:48]
    assert 4 <= first_half.count(0) <= 44


async def test_streams_of_a_killed_worker_go_on_at_the_other(fleet: Fleet) -> None:
    async with AsyncClient(fleet.services["router-0"].address) as client:
        streams = [client.generate(**options(number, 100)) for number in range(8)]
        for stream in streams:
            await anext(stream)
        fleet.services["worker-0"].kill()
        read = await asyncio.gather(*(stream.read() for stream in streams))
    assert [stream.token_ids for stream in read] == [expected(number, 100) for number in range(8)]
    moves = [stream.finished.placement.moves for stream in read if stream.finished is not None]
    assert sorted(set(moves)) == [0, 1]
