"""What a router refuses before it computes anything, and whose stream a repeated request id is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from qwire import Client, QwireError
from qwire.errors import DETAILS_KEY, PUSHBACK_KEY, Reason
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import generation_pb2_grpc
from tests.helpers.stacks import RunningStack, eventually, running_stack

# Only gRPC itself can say that a call was sent before, so gRPC is made to: what it may try again is the refusal.
RETRIES = (
    "grpc.service_config",
    json.dumps(
        {
            "methodConfig": [
                {
                    "name": [{"service": "qwire.v1.GenerationService"}],
                    "retryPolicy": {
                        "maxAttempts": 2,
                        "initialBackoff": "0.01s",
                        "maxBackoff": "0.01s",
                        "backoffMultiplier": 1,
                        "retryableStatusCodes": ["ALREADY_EXISTS"],
                    },
                }
            ]
        }
    ),
)


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> Iterator[RunningStack]:
    """A worker that runs one request and lets one wait."""
    flags = ("--kv-cache-mib", "64", "--max-running", "1", "--max-waiting", "1")
    with running_stack(tiny_model, "tiny", worker_flags=flags) as stack:
        yield stack


def test_a_full_worker_refuses_at_once_and_those_it_has_go_on(small: RunningStack) -> None:
    with small.client() as client, grpc.insecure_channel(small.address) as channel:
        running = client.generate(token_ids=[1, 2, 3], max_tokens=3000, ignore_eos=True, temperature=0)
        next(running)
        waiting = client.generate(token_ids=[4, 5, 6], max_tokens=5, ignore_eos=True, temperature=0)
        waiting.start()
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        seconds = []
        for _ in range(20):
            started = time.monotonic()
            # A long text: tokenizing it would take much longer than the answer.
            call = stub.Generate(pb.GenerateRequest(text="the rain in Spain " * 5_000))
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            seconds.append(time.monotonic() - started)
            error = QwireError.from_rpc(caught.value)
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.OVERLOADED)
            assert error.retry_after is not None and error.retry_after > 0
            assert {DETAILS_KEY, PUSHBACK_KEY} <= {key for key, _ in call.trailing_metadata()}
        seconds.sort()
        print(f"refused in {1000 * seconds[10]:.1f} ms (median), {1000 * seconds[-1]:.1f} ms (longest)")
        assert seconds[10] < 0.2  # 10 ms are what it may take on a machine with nothing else to do
        assert len(running.read().token_ids) == 3000
        assert len(waiting.read().token_ids) == 5
        assert len(client.generate(token_ids=[7], max_tokens=3, ignore_eos=True).read().token_ids) == 3


def test_a_live_duplicate_is_refused_and_the_first_goes_on(tiny: RunningStack, client: Client) -> None:
    first = client.generate(token_ids=[1, 2, 3], max_tokens=200, ignore_eos=True, request_id="once")
    next(first)
    with pytest.raises(QwireError) as caught:
        client.generate(token_ids=[1, 2, 3], max_tokens=5, request_id="once").start()
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.DUPLICATE_REQUEST_ID)
    assert len(first.read().token_ids) == 200
    again = client.generate(token_ids=[1, 2, 3], max_tokens=5, ignore_eos=True, request_id="once")
    assert len(again.read().token_ids) == 5


def test_a_call_that_grpc_sent_again_supersedes_the_first(tiny: RunningStack, client: Client) -> None:
    with Client(tiny.address, options=[RETRIES]) as retrying:
        first = client.generate(token_ids=[1, 2, 3], max_tokens=3000, ignore_eos=True, request_id="again")
        next(first)
        second = retrying.generate(token_ids=[1, 2, 3], max_tokens=200, ignore_eos=True, request_id="again")
        second.start()
        with pytest.raises(QwireError) as caught:
            first.read()
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.ABORTED, Reason.SUPERSEDED)
        # The id is the second's now: a plain duplicate is refused as ever.
        with pytest.raises(QwireError) as caught:
            client.generate(token_ids=[1, 2, 3], max_tokens=5, request_id="again").start()
        assert caught.value.reason == Reason.DUPLICATE_REQUEST_ID
        assert len(second.read().token_ids) == 200
        assert eventually(lambda: tiny.state().active_streams == 0, 2)
        assert eventually(lambda: tiny.state().blocks_in_use == 0, 2)
