"""A network that stalls, cuts and parts router and workers, and workers that are not what they should be.

The workers have no model: what they generate depends on every id before it, and is known beforehand.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qwire import AsyncClient
from qwire.client import Client
from tests.faults.proxy import Proxy, proxy
from tests.helpers.fleets import Fleet, Service, fake_fleet
from tests.helpers.stacks import eventually, write_tiny_model
from worker.fake import continuation

VOCAB = 32_000
STEP_MS = 10
TOKENS = 300
"""So that a stream takes three seconds."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fake_fleet(tmp_path_factory.mktemp("network"), routers=0, worker_flags=("--step-ms", str(STEP_MS))) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def proxies(fleet: Fleet) -> Iterator[list[Proxy]]:
    """One before each worker."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(proxy(fleet.folder / f"proxy-{n}.sock", fleet.services[name].address))
            for n, name in enumerate(fleet.named("worker"))
        ]


@pytest.fixture(scope="module")
def router(fleet: Fleet, proxies: list[Proxy]) -> Service:
    """One that knows the workers only through the proxies."""
    return start_router(fleet, 0, *(proxy.address for proxy in proxies))


def start_router(fleet: Fleet, number: int, *targets: str) -> Service:
    router = fleet.start(
        f"router-{number}",
        "router",
        *(flag for target in targets for flag in ("--worker", target)),
        "--tokenizer",
        f"unix:{fleet.folder}/tokenizer.sock",
        "--admin-listen",
        f"unix:{fleet.folder}/admin-{number}.sock",
    )
    router.wait_until_serving()
    return router


@pytest.fixture
async def client(router: Service, fleet: Fleet) -> AsyncIterator[AsyncClient]:
    assert eventually(lambda: all(worker.ready for worker in fleet.workers()), 20)
    async with AsyncClient(router.address) as client:
        yield client


def options(number: int, tokens: int = TOKENS) -> dict[str, Any]:
    ids = [number, 1, 2]
    return {
        "token_ids": ids,
        "seed": number + 1,
        "temperature": 1.0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "text": False,
    }


def expected(number: int, tokens: int = TOKENS) -> list[int]:
    return continuation([number, 1, 2], tokens, VOCAB, seed=number + 1)


async def in_thread(condition: Any, seconds: float) -> bool:
    return await asyncio.to_thread(eventually, condition, seconds)


async def test_what_is_late_or_cut_is_neither_doubled_nor_missing(
    client: AsyncClient, fleet: Fleet, proxies: list[Proxy]
) -> None:
    chance = random.Random(7)
    streams = [client.generate(**options(number)) for number in range(8)]
    for stream in streams:
        await anext(stream)
    reading = [asyncio.create_task(stream.read()) for stream in streams]
    for number in range(12):
        victim = proxies[number % 2]
        if number % 3 == 2:
            victim.cut()
        else:
            victim.stall()
            await asyncio.sleep(chance.uniform(0.05, 0.3))
            victim.flow()
        await asyncio.sleep(chance.uniform(0.0, 0.1))
    read = await asyncio.gather(*reading)
    assert [stream.token_ids for stream in read] == [expected(number) for number in range(8)]
    moves = [stream.finished.placement.moves for stream in read if stream.finished is not None]
    assert max(moves) > 0
    assert await in_thread(lambda: all(worker.ready for worker in fleet.workers()), 20)


async def test_a_partition_moves_what_ran_there_and_heals_by_itself(
    client: AsyncClient, fleet: Fleet, proxies: list[Proxy]
) -> None:
    boots = {worker.info.boot_id for worker in fleet.workers()}
    streams = [client.generate(**options(number)) for number in range(8)]
    for stream in streams:
        await anext(stream)
    proxies[0].stall()  # both ends stay up, and neither hears anything of the other
    try:
        reading = [asyncio.create_task(stream.read()) for stream in streams]
        assert await in_thread(lambda: not all(worker.ready for worker in fleet.workers()), 10)
        read = await asyncio.gather(*reading)
        assert [stream.token_ids for stream in read] == [expected(number) for number in range(8)]
        assert {stream.finished.placement.worker for stream in read if stream.finished} == {"worker-1"}
    finally:
        proxies[0].flow()
    assert await in_thread(lambda: all(worker.ready for worker in fleet.workers()), 20)
    assert boots == {worker.info.boot_id for worker in fleet.workers()}
    # What the router had placed there was given up at that end too.
    assert await in_thread(lambda: all(not worker.load.blocks_in_use for worker in fleet.workers()), 10)


def test_a_worker_that_is_no_worker_or_another_models_is_kept_out(fleet: Fleet, tmp_path: Path) -> None:
    ours, theirs = write_tiny_model(tmp_path / "ours"), write_tiny_model(tmp_path / "theirs")
    text = (theirs / "tokenizer.json").read_text()
    (theirs / "tokenizer.json").write_text(text + "\n")  # another one, by its digest
    tokenizer = fleet.start("tokenizer", "tokenizer_svc", "--model", str(ours), "--served-model-name", "tiny")
    tokenizer.wait_until_serving()
    workers = [
        fleet.start(f"foreign-{number}", "worker.fake", "--model", str(folder), "--served-model-name", name)
        for number, (folder, name) in enumerate([(ours, "tiny"), (theirs, "tiny"), (ours, "other")])
    ]
    for worker in workers:
        worker.wait_until_serving()
    router = start_router(fleet, 1, *(worker.address for worker in workers), tokenizer.address)
    assert eventually(lambda: sum(bool(worker.kept_out) for worker in fleet.workers(1)) == 3, 20)
    found = {worker.target: worker for worker in fleet.workers(1)}
    assert [worker.ready for worker in found.values()].count(True) == 1
    assert (found[workers[0].address].ready, found[workers[0].address].kept_out) == (True, "")
    assert "is not that of the tokenizer service" in found[workers[1].address].kept_out
    assert "has no model 'other'" in found[workers[2].address].kept_out
    assert "another protocol" in found[tokenizer.address].kept_out
    log = router.log.read_text()
    assert log.count("is kept out") == 3  # each once, however often it is looked at
    with Client(router.address) as client:
        assert [model.name for model in client.models()] == ["tiny"]
        assert len(client.generate("the rain", max_tokens=3, ignore_eos=True).read().token_ids) == 3


def test_two_services_on_one_address(fleet: Fleet) -> None:
    nowhere = ("--worker", "unix:/nowhere", "--tokenizer", "unix:/nowhere")
    first = fleet.start("first", "router", *nowhere, listen="127.0.0.1:0")
    listening = re.compile(r"listening on (127\.0\.0\.1:\d+)")
    assert eventually(lambda: listening.search(first.log.read_text()) is not None, 30)
    port = listening.findall(first.log.read_text())[0]
    for name, module, flags, listen, why in (
        ("second", "router", nowhere, port, "in use"),
        ("second-worker", "worker.fake", (), fleet.services["worker-0"].address, "another server listens"),
    ):
        second = fleet.start(name, module, *flags, listen=listen)
        assert second.process.wait(30) == 2
        assert why in second.log.read_text()
    assert first.process.poll() is None
