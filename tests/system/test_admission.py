"""Whose stream a repeated request id is."""

from __future__ import annotations

import json

import grpc
import pytest

from qwire import Client, QwireError
from qwire.errors import Reason
from tests.helpers.stacks import RunningStack, eventually

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


def test_a_live_duplicate_is_refused_and_the_first_goes_on(tiny: RunningStack, client: Client) -> None:
    first = client.generate(token_ids=[1, 2, 3], max_tokens=3000, ignore_eos=True, request_id="once")
    next(first)
    with pytest.raises(QwireError) as caught:
        client.generate(token_ids=[1, 2, 3], max_tokens=5, request_id="once").start()
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.DUPLICATE_REQUEST_ID)
    assert len(first.read().token_ids) == 3000
    again = client.generate(token_ids=[1, 2, 3], max_tokens=5, ignore_eos=True, request_id="once")
    assert len(again.read().token_ids) == 5


def test_a_call_that_grpc_sent_again_supersedes_the_first(tiny: RunningStack, client: Client) -> None:
    with Client(tiny.address, options=[RETRIES]) as retrying:
        first = client.generate(token_ids=[1, 2, 3], max_tokens=3000, ignore_eos=True, request_id="again")
        next(first)
        second = retrying.generate(token_ids=[1, 2, 3], max_tokens=1500, ignore_eos=True, request_id="again")
        second.start()
        with pytest.raises(QwireError) as caught:
            first.read()
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.ABORTED, Reason.SUPERSEDED)
        # The id is the second's now: a plain duplicate is refused as ever.
        with pytest.raises(QwireError) as caught:
            client.generate(token_ids=[1, 2, 3], max_tokens=5, request_id="again").start()
        assert caught.value.reason == Reason.DUPLICATE_REQUEST_ID
        assert len(second.read().token_ids) == 1500
        assert eventually(lambda: tiny.state().active_streams == 0, 10)
        assert eventually(lambda: tiny.state().blocks_in_use == 0, 10)
