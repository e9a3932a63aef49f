"""Everything is restarted in turn under load, and no request fails. The workers have no model."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwire import Client
from qwire.service.healthcheck import status
from tests.faults.load import Options, Record, References, check, run
from tests.helpers.fleets import Fleet, Service, fake_fleet
from tests.helpers.stacks import eventually, write_tiny_model

CLIENTS = 6
WORKERS = ("--step-ms", "10", "--served-model-name", "tiny", "--grace", "1")
ROUTERS = ("--drain-delay", "0.5")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """That name the model."""
    return ("--model", str(write_tiny_model(tmp_path_factory.mktemp("restarts") / "tiny")))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, flags: tuple[str, ...]) -> Iterator[Fleet]:
    """Two workers, two routers and a tokenizer service."""
    folder = tmp_path_factory.mktemp("fleet")
    with fake_fleet(folder, routers=0, worker_flags=(*flags, *WORKERS)) as fleet:
        fleet.start("tokenizer", "tokenizer_svc", *flags, "--served-model-name", "tiny").wait_until_serving()
        for number in range(2):
            fleet.start_router(number, *ROUTERS)
        wait_until_linked(fleet)
        yield fleet


def wait_until_linked(fleet: Fleet) -> None:
    for number in range(2):
        fleet.services[f"router-{number}"].wait_until_serving()
        assert eventually(lambda: all(worker.ready for worker in fleet.workers(number)), 30)  # noqa: B023


def restart(fleet: Fleet, name: str, flags: tuple[str, ...]) -> None:
    old = fleet.services[name]
    old.process.send_signal(signal.SIGTERM)
    assert old.process.wait(30) == 0, old.log.read_text()
    kind, _, number = name.partition("-")
    match kind:
        case "worker":
            fleet.start_worker(int(number), *flags, *WORKERS)
        case "router":
            fleet.start_router(int(number), *ROUTERS)
        case _:
            fleet.start(name, "tokenizer_svc", *flags, "--served-model-name", "tiny")
    fleet.services[name].wait_until_serving()
    wait_until_linked(fleet)


def options(number: int) -> Options:
    return {
        "token_ids": [1 + number % 5, 2],
        "seed": number % 3,
        "temperature": 1.0,
        "n": 1 + number % 2,
        "max_tokens": 60,
        "ignore_eos": True,
    }


def test_a_rolling_restart_fails_no_request(fleet: Fleet, flags: tuple[str, ...]) -> None:
    over = threading.Event()
    records: list[Record] = []
    addresses = [fleet.services[f"router-{number}"].address for number in range(2)]

    def ask(first: int) -> None:
        with Client(addresses) as client:
            number = first
            while not over.is_set():
                asked = options(number)
                records.append(run(client, asked, Record(asked)))
                number += CLIENTS

    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(ask, number) for number in range(CLIENTS)]
        try:
            for name in ("worker-0", "worker-1", "router-0", "router-1", "tokenizer"):
                before = len(records)
                restart(fleet, name, flags)
                assert eventually(lambda: len(records) >= before + 2 * CLIENTS, 60)  # noqa: B023
        finally:
            over.set()
        for future in futures:
            future.result(60)
    with Client(addresses) as client:
        check(records, References(client))
    moved = sum(any(finished.placement.moves for finished in record.finished.values()) for record in records)
    print(f"{len(records)} requests, {moved} of them moved")
    for number in range(2):
        assert eventually(lambda: all(not w.load.blocks_in_use for w in fleet.workers(number)), 5)  # noqa: B023


def test_a_router_that_drains_is_left_before_it_ends(fleet: Fleet, tmp_path: Path) -> None:
    router: Service = fleet.start_router(2, "--drain-delay", "3")
    router.wait_until_serving()
    with Client(router.address, options=[("grpc.service_config", "{}")]) as plain, Client(router.address) as client:
        stream = client.generate(token_ids=[1], max_tokens=400, ignore_eos=True, text=False)
        next(stream)
        started = time.monotonic()
        router.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: status(router.address, "") == "NOT_SERVING", 10)
        # Who doesn't watch its health is still served, and what runs runs on.
        late = plain.generate(token_ids=[2], max_tokens=3, ignore_eos=True, text=False)
        assert len(late.read().token_ids) == 3
        assert router.process.poll() is None
        assert len(stream.read().token_ids) == 400
        assert router.process.wait(30) == 0
        assert time.monotonic() - started >= 3
    del fleet.services["router-2"]
