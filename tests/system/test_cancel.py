"""Cancelled work stops and gives back what it held."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from qwire import Client, QwireError
from tests.helpers.faulty_worker import BRAKE
from tests.helpers.stacks import FAULTY_WORKER, RunningStack, eventually, running_stack


@pytest.fixture(scope="module")
def tiny(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """With a worker that is slow on purpose, so that no stream is over before it is cancelled."""
    brake = tmp_path_factory.mktemp("brake") / "on"
    brake.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BRAKE, str(brake))
        with running_stack(tiny_model, "tiny", worker_flags=("--kv-cache-mib", "64"), commands=FAULTY_WORKER) as stack:
            yield stack


def test_a_client_that_cancels_mid_stream(tiny: RunningStack, client: Client) -> None:
    before = tiny.state().blocks_in_use
    generation = client.generate(token_ids=list(range(200)), max_tokens=3000, ignore_eos=True)
    for number, _ in enumerate(generation):
        if number == 5:
            break
    assert eventually(lambda: tiny.state().blocks_in_use > before, 10)
    generation.cancel()
    assert eventually(lambda: tiny.state().blocks_in_use == before, 10)
    assert eventually(lambda: tiny.state().active_streams == 0, 10)


def test_a_client_that_cancels_during_prefill_and_in_the_queue(tiny: RunningStack, client: Client) -> None:
    before = tiny.state().blocks_in_use
    generations = [
        client.generate(token_ids=[number] * 3500, max_tokens=100, ignore_eos=True, bypass=True) for number in range(8)
    ]
    for generation in generations:
        generation.start()
    for generation in generations:
        generation.cancel()
    assert eventually(lambda: tiny.state().blocks_in_use == before, 10)
    assert eventually(lambda: tiny.state().requests_waiting == 0, 10)


def test_a_client_that_goes_away(tiny: RunningStack) -> None:
    before = tiny.state().blocks_in_use
    with tiny.client() as leaving:
        streams = [leaving.generate(token_ids=[n] * 20, max_tokens=3000, ignore_eos=True) for n in range(16)]
        for stream in streams:
            next(stream)
        assert tiny.state().active_streams == 16
    assert eventually(lambda: tiny.state().active_streams == 0, 10)
    assert eventually(lambda: tiny.state().blocks_in_use == before, 10)


def test_a_deadline_in_decode(tiny: RunningStack, client: Client) -> None:
    started = time.monotonic()
    with pytest.raises(QwireError) as caught:
        client.generate(token_ids=[1] * 10, max_tokens=3900, ignore_eos=True, timeout=0.5).read()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 5
    assert eventually(lambda: tiny.state().blocks_in_use == 0, 10)
