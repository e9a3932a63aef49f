"""A worker is killed, stopped or told to end under load: no client notices more than a pause."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.faults.conftest import TOKENS
from tests.faults.load import Load, Options, Record, References, check, check_nothing_left, load
from tests.faults.processes import busiest, engine_pid, stopped, wait_for_workers, workers
from tests.helpers.stacks import RunningStack, eventually


def moves(records: list[Record]) -> list[int]:
    return [max(finished.placement.moves for finished in record.finished.values()) for record in records]


def test_killed_mid_stream(pair: RunningStack, references: References, mixed: list[Options], brake: Path) -> None:
    with load(pair.address, mixed, brake) as running:
        running.wait_for_tokens(20)
        victim = busiest(pair)
        streams = workers(pair)[victim].streams
        killed = time.monotonic()
        os.kill(engine_pid(pair, victim), signal.SIGKILL)
    print(f"longest gap {max(record.gap(killed) for record in running.records):.2f} s, {streams} streams moved")
    check(running.records, references)
    assert sum(moves(running.records)) >= max(1, streams - 1)  # one of them may end by itself just then
    moved = [
        finished for record in running.records for finished in record.finished.values() if finished.placement.moves
    ]
    assert all(finished.placement.recomputed_tokens > 0 for finished in moved)
    wait_for_workers(pair)
    check_nothing_left(pair)


def test_stopped_mid_stream_is_noticed_and_what_it_says_later_is_dropped(
    pair: RunningStack, references: References, mixed: list[Options], brake: Path
) -> None:
    with load(pair.address, mixed, brake) as running:
        running.wait_for_tokens(20)
        victim = busiest(pair)
        with stopped(engine_pid(pair, victim)):
            since = time.monotonic()
            assert eventually(lambda: not workers(pair)[victim].ready, 10)
            noticed = time.monotonic() - since
            running.go_on()
            running.wait_until(lambda: all(record.gap(since) > 0 or record.statuses for record in running.records))
    print(f"noticed after {noticed:.2f} s, longest gap {max(record.gap(since) for record in running.records):.2f} s")
    check(running.records, references)
    assert sum(moves(running.records)) > 0
    wait_for_workers(pair)
    check_nothing_left(pair)


def test_killed_while_requests_are_queued(pair: RunningStack, references: References, brake: Path) -> None:
    # 16 streams on two workers that run six each.
    requests = [
        {"token_ids": [number, 1], "temperature": 0, "max_tokens": 300, "ignore_eos": True} for number in range(16)
    ]
    with load(pair.address, requests, brake) as running:
        running.wait_until(lambda: sum(worker.load.waiting for worker in workers(pair)) >= 4)
        victim = busiest(pair)
        queued = workers(pair)[victim].load.waiting
        os.kill(engine_pid(pair, victim), signal.SIGKILL)
    check(running.records, references)
    print(f"{queued} were queued there, moves: {moves(running.records)}")
    assert set(moves(running.records)) == {0, 1}
    assert moves(running.records).count(1) >= 1
    wait_for_workers(pair)
    check_nothing_left(pair)


def test_told_to_end(pair: RunningStack, references: References, mixed: list[Options], brake: Path) -> None:
    with load(pair.address, mixed, brake) as running:
        running.wait_for_tokens(20)
        victim = busiest(pair)
        socket = pair.stack._socket(f"worker-{victim}")
        with grpc.insecure_channel(socket) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            os.kill(pair.pids[f"worker-{victim}"], signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert eventually(lambda: not workers(pair)[victim].ready, 10)
        late = Load(pair.address, [{"token_ids": [3, 3], "temperature": 0, "max_tokens": 5, "ignore_eos": True}])
        late.start()
        (record,) = late.finish()
    check([*running.records, record], references)
    assert record.finished[0].placement.worker == workers(pair)[1 - victim].info.worker_id
    wait_for_workers(pair)
    check_nothing_left(pair)


def test_a_tokenizer_service_that_is_killed_costs_no_character(
    pair: RunningStack, references: References, mixed: list[Options], brake: Path
) -> None:
    bare: Options = {"token_ids": [5, 5], "temperature": 0, "max_tokens": 20, "ignore_eos": True, "text": False}
    with load(pair.address, mixed, brake) as running:
        running.wait_for_tokens(20)
        pid = pair.pids["tokenizer"]
        os.kill(pid, signal.SIGKILL)
        unaffected = Load(pair.address, [bare])
        unaffected.start()
        check(unaffected.finish(), references)
    check(running.records, references)
    assert eventually(lambda: pair.pids.get("tokenizer", pid) != pid, 40)
    check_nothing_left(pair)
    assert len(running.records[0].ids[0]) == TOKENS
