"""The only worker is killed: a bounded wait, then a typed refusal, and recovery without help."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from qwire import Client, QwireError, Reason
from qwire.service.healthcheck import status
from qwire.stack import RestartPolicy
from tests.faults.processes import workers
from tests.helpers.stacks import RunningStack, eventually, running_stack

WAIT = 1.5


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> Iterator[RunningStack]:
    flags = ("--kv-cache-mib", "64", "--threads", "1")
    with running_stack(
        tiny_model,
        "tiny",
        worker_flags=flags,
        router_flags=("--worker-wait", str(WAIT)),
        restart=RestartPolicy(first_delay=3 * WAIT),
    ) as stack:
        yield stack


def test_the_only_worker_is_killed(alone: RunningStack) -> None:
    with Client(alone.address, options=[("grpc.enable_retries", 0)]) as client:  # or gRPC waits for the worker
        stream = client.generate(token_ids=[1], max_tokens=3000, ignore_eos=True)
        queued = client.generate(token_ids=[2], max_tokens=3000, ignore_eos=True)
        once = client.generate(token_ids=[3], max_tokens=3, ignore_eos=True, temperature=0).read()
        for generation in (stream, queued):
            next(generation)
        os.kill(alone.pids["worker-0"], signal.SIGKILL)
        assert eventually(lambda: not workers(alone)[0].ready, 10)
        started = time.monotonic()
        with pytest.raises(QwireError) as caught:
            client.generate(token_ids=[1], max_tokens=3).start()
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.NO_WORKER)
        assert caught.value.retry_after is not None
        assert time.monotonic() - started >= WAIT
        assert eventually(lambda: status(alone.address, "") == "NOT_SERVING", 2 * WAIT)
        # The library tries streams that had begun again, and by then the worker may be back.
        assert eventually(lambda: workers(alone)[0].ready, 60)
        assert eventually(lambda: status(alone.address, "") == "SERVING", 10)
        again = client.generate(token_ids=[3], max_tokens=3, ignore_eos=True, temperature=0).read()
        assert again.token_ids == once.token_ids
        for generation in (stream, queued):
            assert next(generation).token_ids
            generation.cancel()
        assert eventually(lambda: alone.state().blocks_in_use == 0, 5)
