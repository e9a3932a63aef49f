"""Clients that don't read, and clients that are killed: their streams end, and nobody else notices."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from qwire import Client, QwireError, Reason
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import generation_pb2_grpc
from tests.helpers.fleets import Fleet, fake_fleet
from tests.helpers.stacks import eventually
from worker.fake import continuation

VOCAB = 32_000
CHOICES = 8
TOKENS = 2_000


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fake_fleet(
        tmp_path_factory.mktemp("readers"),
        workers=1,
        worker_flags=("--step-ms", "2", "--token-us", "0"),
        router_flags=("--write-timeout", "1", "--max-pending-tokens", "256"),
    ) as fleet:
        yield fleet


def streams(fleet: Fleet) -> int:
    return fleet.workers()[0].streams


def ids(messages: list[pb.GenerateResponse], choice: int) -> list[int]:
    return [token for message in messages if message.delta.choice == choice for token in message.delta.token_ids]


def read_all(call: Any, into: list[pb.GenerateResponse]) -> QwireError | None:
    try:
        into.extend(call)
    except grpc.RpcError as error:
        return QwireError.from_rpc(error)
    return None


def test_a_client_that_does_not_read_is_cut_off_and_can_go_on(fleet: Fleet) -> None:
    request = pb.GenerateRequest(stop=pb.StopOptions(max_tokens=TOKENS, ignore_eos=True))
    request.token_ids.ids.extend([1, 2])
    request.sampling.seed, request.sampling.temperature, request.sampling.n = 5, 1, CHOICES
    request.output.text = False
    address = fleet.services["router-0"].address
    # Without a probe of the bandwidth a client takes no more than 64 KiB that it hasn't read.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel, Client(address) as neighbour:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(request)
        messages = [next(call)]
        memory = fleet.services["router-0"].memory
        other = neighbour.generate(token_ids=[3], max_tokens=1_000, ignore_eos=True, temperature=0, text=False)
        assert other.read().token_ids == continuation([3], 1_000, VOCAB)  # it runs beside the one that is stuck
        assert eventually(lambda: streams(fleet) == 0, 30)
        assert fleet.services["router-0"].memory - memory < 16 * 1024 * 1024
        error = read_all(call, messages)
        assert error is not None
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.SLOW_READER)
        got = [len(ids(messages, choice)) for choice in range(CHOICES)]
        assert min(got) > 0 and max(got) < TOKENS

        again = pb.GenerateRequest()
        again.CopyFrom(request)
        again.resume.token = messages[0].accepted.resume_token
        for choice in range(CHOICES):
            again.resume.choices.add(token_ids=ids(messages, choice))
        assert read_all(stub.Generate(again), messages) is None
        for choice in range(CHOICES):
            expected = continuation([1, 2], TOKENS, VOCAB, seed=5, choice=choice)
            assert ids(messages, choice) == expected


def test_the_library_reads_on_by_itself_however_slowly_its_caller_reads(fleet: Fleet) -> None:
    options = [("grpc.http2.bdp_probe", 0)]
    with Client(fleet.services["router-0"].address, options=options) as client:
        stream = client.generate(token_ids=[4], max_tokens=TOKENS, ignore_eos=True, n=CHOICES, seed=1, text=False)
        next(stream)
        assert eventually(lambda: streams(fleet) == 0, 30)
        stream.read()
        assert stream.choices[CHOICES - 1].token_ids == continuation([4], TOKENS, VOCAB, seed=1, choice=CHOICES - 1)


KILLED = """
import sys, time
from qwire import Client
client = Client(sys.argv[1])
streams = [client.generate(token_ids=[n], max_tokens=20_000, ignore_eos=True, text=False) for n in range(16)]
for stream in streams:
    next(stream)
print("all run", flush=True)
time.sleep(600)
"""


def test_a_client_that_is_killed(fleet: Fleet) -> None:
    argv = [sys.executable, "-c", KILLED, fleet.services["router-0"].address]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"all run\n"
            assert streams(fleet) == 16
        finally:
            process.kill()
    started = time.monotonic()
    assert eventually(lambda: streams(fleet) == 0 and fleet.workers()[0].load.blocks_in_use == 0, 10)
    print(f"all gone after {time.monotonic() - started:.2f} s")


def test_an_answer_in_one_piece_has_no_reader_that_could_be_slow(tmp_path: Path) -> None:
    """More tokens come while GenerateOnce's answer is put together than a stream's reader may leave."""
    with (
        fake_fleet(
            tmp_path,
            workers=1,
            worker_flags=("--step-ms", "2", "--token-us", "0"),
            router_flags=("--max-pending-tokens", "4"),
        ) as fleet,
        Client(fleet.services["router-0"].address) as client,
    ):
        answer = client.generate_once(token_ids=[3], n=2, max_tokens=400, ignore_eos=True, temperature=0, text=False)
        assert [list(choice.token_ids) for choice in answer.choices] == [
            continuation([3], 400, VOCAB, choice=choice) for choice in range(2)
        ]
