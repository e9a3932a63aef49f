"""A service that is told to stop ends as soon as what it serves is done, whoever else is connected."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.helpers.stacks import RunningStack, eventually, running_stack


@pytest.fixture
def stack(tiny_model: Path) -> Iterator[RunningStack]:
    with running_stack(tiny_model, "tiny", worker_flags=("--kv-cache-mib", "64")) as stack:
        yield stack


def stop(stack: RunningStack, service: str) -> float:
    """Seconds until a service that gets SIGTERM is started anew, which is when it has ended."""
    pid, started = stack.pids[service], time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert eventually(lambda: stack.pids.get(service, pid) != pid, 40)
    assert f"{service} exited with status 0" in "\n".join(stack.lines)
    return time.monotonic() - started


def test_a_tokenizer_service_that_stops_waits_for_no_router_and_costs_no_stream_its_text(stack: RunningStack) -> None:
    with stack.client() as client:
        generation = client.generate(token_ids=[1, 2, 3], max_tokens=600, ignore_eos=True)
        next(generation)
        assert stop(stack, "tokenizer") < 5
        generation.read()
        assert len(generation.token_ids) == 600
        assert generation.text == client.decode(generation.token_ids)


def test_a_router_that_stops_waits_for_streams_and_not_for_those_who_watch_its_health(stack: RunningStack) -> None:
    with grpc.insecure_channel(stack.address) as channel, stack.client() as client:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        generation = client.generate(token_ids=[1, 2, 3], max_tokens=300, ignore_eos=True)
        next(generation)
        assert stop(stack, "router") < 15
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert len(generation.read().token_ids) == 300
