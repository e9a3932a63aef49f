"""A router's queue through real processes: full, in order, and left early."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from qwire import Client, QwireError, Reason
from qwire.client import Generation
from qwire.errors import DETAILS_KEY, PUSHBACK_KEY
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import generation_pb2_grpc
from tests.helpers.fleets import Fleet, fake_fleet
from tests.helpers.stacks import eventually

QUEUED = 3
TENANT_QUEUED = 2


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A worker that runs one request and is sent one more; three may wait at the router, two of a tenant."""
    with fake_fleet(
        tmp_path_factory.mktemp("queue"),
        workers=1,
        worker_flags=("--step-ms", "10", "--max-running", "1", "--max-waiting", "1"),
        router_flags=("--max-queued", str(QUEUED), "--tenant-max-queued", str(TENANT_QUEUED)),
    ) as fleet:
        yield fleet


@pytest.fixture
def client(fleet: Fleet) -> Iterator[Client]:
    with plain_client(fleet) as client:
        yield client
    assert eventually(lambda: (fleet.state().active_streams, fleet.state().requests_queued) == (0, 0), 10)


def plain_client(fleet: Fleet, tenant: str = "") -> Client:
    """One that asks once, whatever the answer is."""
    metadata = [("qwire-tenant", tenant)] if tenant else []
    return Client(fleet.services["router-0"].address, metadata=metadata, options=[("grpc.enable_retries", 0)])


@contextmanager
def busy(client: Client) -> Iterator[list[Generation]]:
    """The worker has all that it takes."""
    streams = []
    try:
        for number in range(2):
            streams.append(client.generate(token_ids=[9, number], max_tokens=20_000, ignore_eos=True, text=False))
            streams[-1].start()
        next(streams[0])  # it runs, and the other waits behind it
        yield streams
    finally:
        for stream in streams:
            stream.cancel()


def queue(fleet: Fleet, client: Client, count: int) -> list[Generation]:
    """Requests that wait at the router."""
    waiting = []
    for number in range(count):
        before = fleet.state().requests_queued
        waiting.append(client.generate(token_ids=[8, number], max_tokens=3, ignore_eos=True, text=False))
        assert eventually(lambda: fleet.state().requests_queued == before + 1, 10)  # noqa: B023
    return waiting


def refusal_of_silence(channel: grpc.Channel) -> QwireError:
    """What a call is answered that never sends its request."""
    never = threading.Event()
    method: Any = channel.stream_unary("/qwire.v1.GenerationService/GenerateOnce")
    try:
        error = method.future(iter(never.wait, None), timeout=10).exception()
        assert isinstance(error, grpc.RpcError)
        return QwireError.from_rpc(error)
    finally:
        never.set()


def test_a_deadline_that_passes_in_the_queue_never_reaches_a_worker(fleet: Fleet, client: Client) -> None:
    # The first test: once turns were measured, such a request isn't even taken.
    with busy(client):
        assert eventually(lambda: fleet.workers()[0].load.submits_seen >= 2, 5)  # a worker says so some time after
        submits = fleet.workers()[0].load.submits_seen
        for timeout in (0.3, 0.001):
            with pytest.raises(QwireError) as caught:
                client.generate(token_ids=[1], max_tokens=3, text=False, timeout=timeout).start()
            assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert eventually(lambda: fleet.state().requests_queued == 0, 5)
    assert eventually(lambda: fleet.state().requests_running == 0, 5)
    assert len(client.generate(token_ids=[1], max_tokens=3, ignore_eos=True, text=False).read().token_ids) == 3
    assert eventually(lambda: fleet.workers()[0].load.submits_seen > submits, 5)
    assert fleet.workers()[0].load.submits_seen == submits + 1


def test_no_thread_of_a_router_interrupts_the_one_that_wakes_it(fleet: Fleet) -> None:
    router = fleet.services["router-0"].pid
    threads = {int(path.parent.name): path.read_text().strip() for path in Path("/proc").glob(f"{router}/task/*/comm")}
    woken = [thread for thread, name in threads.items() if thread == router or name == "event_engine"]
    assert len(woken) > 1
    assert {os.sched_getscheduler(thread) for thread in woken} == {os.SCHED_BATCH}


def test_a_full_queue_refuses_at_once_and_those_that_were_taken_go_on(fleet: Fleet, client: Client) -> None:
    with (
        busy(client) as streams,
        plain_client(fleet, "b") as other,
        grpc.insecure_channel(fleet.services["router-0"].address) as channel,
    ):
        waiting = queue(fleet, client, TENANT_QUEUED)
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        text = "the rain in Spain " * 5_000  # tokenizing it would take much longer than the answer

        def refusal(tenant: str) -> QwireError:
            call = stub.Generate(pb.GenerateRequest(text=text), metadata=(("qwire-tenant", tenant),) if tenant else ())
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert {DETAILS_KEY, PUSHBACK_KEY} <= {key for key, _ in call.trailing_metadata()}
            error = QwireError.from_rpc(caught.value)
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
            assert error.retry_after is not None and error.retry_after > 0
            return error

        assert "--tenant-max-queued" in refusal("").message
        waiting += queue(fleet, other, QUEUED - TENANT_QUEUED)
        refused, seconds = fleet.state().requests_refused, []
        for number in range(20):
            started = time.monotonic()
            assert "--max-queued" in refusal(f"tenant-{number}").message
            seconds.append(time.monotonic() - started)
        seconds.sort()
        print(f"refused in {1000 * seconds[10]:.1f} ms (median), {1000 * seconds[-1]:.1f} ms (longest)")
        assert fleet.state().requests_refused == refused + 20
        assert refusal_of_silence(channel).reason == Reason.OVERLOADED  # nothing has to be read for it
        assert next(streams[0]).token_ids  # its worker goes on
        for stream in streams:
            stream.cancel()
        assert [len(stream.read().token_ids) for stream in waiting] == [3] * QUEUED


def test_a_request_that_is_cancelled_in_the_queue_leaves_it_at_once(fleet: Fleet, client: Client) -> None:
    with busy(client):
        (waiting,) = queue(fleet, client, 1)
        waiting.cancel()
        assert eventually(lambda: fleet.state().requests_queued == 0, 10)
        with pytest.raises(QwireError) as caught:
            waiting.start()
        assert caught.value.code is grpc.StatusCode.CANCELLED
        assert fleet.state().active_streams == 2


def test_turns_go_by_priority_and_a_deadline_that_cannot_be_met_is_refused(fleet: Fleet, client: Client) -> None:
    ended: list[str] = []
    lock = threading.Lock()

    def run(name: str, client: Client, priority: int) -> None:
        tokens = 50  # of 10 ms, so that ends are far apart
        client.generate(token_ids=[7], max_tokens=tokens, ignore_eos=True, priority=priority, text=False).read()
        with lock:
            ended.append(name)

    with plain_client(fleet, "b") as other, ThreadPoolExecutor(3) as pool, busy(client) as streams:
        futures = []
        for number, (name, whose, priority) in enumerate(
            [("last", client, -1), ("first", other, 1), ("second", client, 0)]
        ):
            futures.append(pool.submit(run, name, whose, priority))
            assert eventually(lambda: fleet.state().requests_queued == number + 1, 10)  # noqa: B023
        for stream in streams:
            stream.cancel()
        for future in futures:
            future.result(60)
    assert ended == ["first", "second", "last"]

    # Turns have been measured by now, and one that is overdue counts.
    with busy(client):
        waiting = queue(fleet, client, 1)

        def reason() -> str:
            with pytest.raises(QwireError) as caught:
                client.generate(token_ids=[1], max_tokens=3, text=False, timeout=1.0).start()
            if caught.value.reason == Reason.DEADLINE_UNREACHABLE:
                assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert caught.value.retry_after is not None
                assert "estimated" in caught.value.message
            return caught.value.reason

        assert eventually(lambda: reason() == Reason.DEADLINE_UNREACHABLE, 60)
        for stream in waiting:
            stream.cancel()
