"""Cancelled work stops and gives back what it held."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest

from qwire import Client, QwireError
from tests.helpers.stacks import RunningStack, eventually, running_stack


def test_a_client_that_cancels_mid_stream(tiny: RunningStack, client: Client) -> None:
    before = tiny.state().blocks_in_use
    generation = client.generate(token_ids=list(range(200)), max_tokens=3000, ignore_eos=True)
    for number, _ in enumerate(generation):
        if number == 5:
            break
    assert eventually(lambda: tiny.state().blocks_in_use > before, 2)
    generation.cancel()
    assert eventually(lambda: tiny.state().blocks_in_use == before, 1)
    assert eventually(lambda: tiny.state().active_streams == 0, 1)


def test_a_client_that_cancels_during_prefill_and_in_the_queue(tiny: RunningStack, client: Client) -> None:
    before = tiny.state().blocks_in_use
    generations = [
        client.generate(token_ids=[number] * 3500, max_tokens=100, ignore_eos=True, bypass=True) for number in range(8)
    ]
    for generation in generations:
        generation.start()
    for generation in generations:
        generation.cancel()
    assert eventually(lambda: tiny.state().blocks_in_use == before, 2)
    assert eventually(lambda: tiny.state().requests_waiting == 0, 1)


def test_a_client_that_goes_away(tiny: RunningStack) -> None:
    before = tiny.state().blocks_in_use
    with tiny.client() as leaving:
        streams = [leaving.generate(token_ids=[n] * 20, max_tokens=3000, ignore_eos=True) for n in range(16)]
        for stream in streams:
            next(stream)
        assert tiny.state().active_streams == 16
    assert eventually(lambda: tiny.state().active_streams == 0, 2)
    assert eventually(lambda: tiny.state().blocks_in_use == before, 1)


def test_a_deadline_in_the_queue(tiny_model: Path) -> None:
    with (
        running_stack(tiny_model, "tiny", worker_flags=("--max-running", "1")) as narrow,
        narrow.client() as client,
    ):
        first = client.generate(token_ids=[1] * 10, max_tokens=3000, ignore_eos=True)
        next(first)
        for timeout in (0.5, 1e-6):  # the second has passed before anyone could start
            with pytest.raises(QwireError) as caught:
                client.generate(token_ids=[2] * 10, max_tokens=5, timeout=timeout).read()
            assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert eventually(lambda: narrow.state().requests_waiting == 0, 1)
        first.cancel()
        assert eventually(lambda: narrow.state().blocks_in_use == 0, 1)


def test_a_deadline_in_decode(tiny: RunningStack, client: Client) -> None:
    started = time.monotonic()
    with pytest.raises(QwireError) as caught:
        client.generate(token_ids=[1] * 10, max_tokens=3900, ignore_eos=True, timeout=0.5).read()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 5
    assert eventually(lambda: tiny.state().blocks_in_use == 0, 1)
