"""Whose turn it is, over real processes: tenants, priorities, and a long prompt beside a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from qwire import AsyncClient
from tests.helpers.fleets import Fleet, fake_fleet
from worker.fake import continuation

VOCAB = 32_000


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    # A prompt of 4,000 tokens takes two seconds, two steps of it by itself.
    flags = ("--step-ms", "4", "--token-us", "500", "--max-running", "2", "--max-waiting", "100")
    with fake_fleet(tmp_path_factory.mktemp("turns"), workers=1, worker_flags=flags) as fleet:
        yield fleet


def options(number: int, tokens: int, **more: Any) -> dict[str, Any]:
    ids = [number, 1, 2]
    return {"token_ids": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "text": False, **more}


async def finish(client: AsyncClient, order: list[str], name: str, number: int, tokens: int, **more: Any) -> None:
    generation = await client.generate(**options(number, tokens, **more)).read()
    assert generation.token_ids == continuation([number, 1, 2], tokens, VOCAB)
    order.append(name)


async def test_neither_a_long_queue_nor_low_priority_is_in_front_of_others(fleet: Fleet) -> None:
    address = fleet.services["router-0"].address
    order: list[str] = []
    async with (
        AsyncClient(address, metadata=[("qwire-tenant", "flood")]) as flood,
        AsyncClient(address, metadata=[("qwire-tenant", "new")]) as new,
    ):
        streams = [asyncio.create_task(finish(flood, order, "flood", number, 20)) for number in range(40)]
        low = asyncio.create_task(finish(flood, order, "low", 50, 20, priority=-10))
        while len(order) < 2:
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(finish(new, order, "new", 60 + number, 20)) for number in range(3)]
        high = asyncio.create_task(finish(flood, order, "high", 70, 20, priority=5))
        await asyncio.gather(*streams, low, *others, high)
    # By arrival all of these would come last, and the low one before them.
    for name in ("new", "high"):
        assert "flood" in order[len(order) - order[::-1].index(name) + 10 :], (
            f"{name} waited for a whole queue: {order}"
        )
    assert order.index("low") > order.index("high")


async def test_a_stream_goes_on_beside_a_long_prompt(fleet: Fleet) -> None:
    async with (
        AsyncClient(fleet.services["router-0"].address) as client,
        client.generate(**options(80, 4000)) as stream,
    ):

        async def read() -> None:
            async for _ in stream:
                pass

        reading = asyncio.create_task(read())
        while not stream.token_ids:
            await asyncio.sleep(0.01)
        begun = len(stream.token_ids)
        prompt = [7 * number % VOCAB for number in range(4000)]
        long = await client.generate(token_ids=prompt, max_tokens=1, temperature=0, text=False).read()
        # In whole chunks the prompt would have taken two steps, in each of which the stream gets a token.
        assert len(stream.token_ids) - begun >= 50
        assert long.token_ids == continuation(prompt, 1, VOCAB)
        reading.cancel()
