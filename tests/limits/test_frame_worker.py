"""The worker that router benchmarks are loaded with speaks the link as routers do now."""

from __future__ import annotations

import asyncio
from pathlib import Path

from qwire import AsyncClient
from tests.helpers.fleets import Fleet


async def test_streams_that_begin_together_are_all_served(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        fleet.start_worker(0, "--step-ms", "5", "--max-running", "100", module="benchmarks.frame_worker")
        fleet.start_router(0)
        for service in fleet.services.values():
            await asyncio.to_thread(service.wait_until_serving)
        async with AsyncClient(fleet.services["router-0"].address) as client:

            async def ids(number: int) -> int:
                count = 0
                async with client.generate(
                    token_ids=[number, 1], max_tokens=500, ignore_eos=True, text=False
                ) as stream:
                    async for delta in stream:
                        count += len(delta.token_ids)
                        if count >= 3:
                            break
                return count

            async with asyncio.timeout(60):
                counts = await asyncio.gather(*(ids(number) for number in range(40)))
        assert min(counts) >= 3
    finally:
        fleet.stop()
