"""A router is killed or told to end, and a cut stream is gone on with at another: by the library, and by hand."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from qwire import AsyncClient, Client, QwireError, Reason
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import generation_pb2_grpc
from tests.faults.conftest import TOKENS
from tests.faults.load import Options, References, check, check_nothing_left, load
from tests.faults.processes import another_router, workers
from tests.helpers.stacks import RunningStack, eventually

GREEDY: Options = {"token_ids": [1, 2, 3], "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}


@pytest.fixture
def client(pair: RunningStack) -> Iterator[Client]:
    with pair.client() as client:
        yield client


def test_a_router_that_is_killed(pair: RunningStack, references: References, mixed: list[Options], brake: Path) -> None:
    with another_router(pair) as router:
        with load([router.address, pair.address], mixed, brake) as running:
            running.wait_for_tokens(20)
            killed = time.monotonic()
            router.kill()
        print(f"longest gap {max(record.gap(killed) for record in running.records):.2f} s")
        check(running.records, references)
        check_nothing_left(pair)


@pytest.mark.usefixtures("braked")
def test_workers_free_what_a_killed_router_left_behind(pair: RunningStack) -> None:
    with another_router(pair) as router, Client(router.address) as client:
        streams = [client.generate(**{**GREEDY, "token_ids": [n], "max_tokens": 3000}) for n in range(4)]
        for stream in streams:
            next(stream)
        assert eventually(lambda: pair.state().blocks_in_use > 0, 5)
        router.kill()
        check_nothing_left(pair)


def test_a_router_that_is_told_to_end(
    pair: RunningStack, references: References, mixed: list[Options], brake: Path
) -> None:
    with another_router(pair, "--grace", "1") as router:
        with load([router.address, pair.address], mixed, brake) as running:
            running.wait_for_tokens(20)
            router.process.send_signal(signal.SIGTERM)
        check(running.records, references)
        assert router.process.wait(10) == 0
        with pytest.raises(QwireError) as caught:
            Client(router.address).generate(**GREEDY).start()
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def test_an_async_client_and_a_call_that_answers_once(pair: RunningStack, references: References) -> None:
    expected = await asyncio.to_thread(references.of, GREEDY)
    with another_router(pair) as router:
        async with AsyncClient([router.address, pair.address]) as client:
            generation = client.generate(**GREEDY)
            await generation.start()  # the first turn is the other router's
            await client.models()
            once = asyncio.create_task(client.generate_once(**GREEDY))
            await anext(generation)
            router.kill()
            assert (await generation.read()).token_ids == expected.ids[0]
            assert list((await once).choices[0].token_ids) == expected.ids[0]
    check_nothing_left(pair)


# By hand, as from any other language.


class Wire:
    """A stub of GenerationService, and what a stream of it brought."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.stub = generation_pb2_grpc.GenerationServiceStub(self.channel)

    def read(self, request: pb.GenerateRequest, tokens: int | None = None) -> list[pb.GenerateResponse]:
        """The messages of a stream; cut, by cancelling it, once so many tokens have come."""
        call = self.stub.Generate(request, timeout=60)
        messages: list[pb.GenerateResponse] = []
        for message in call:
            messages.append(message)
            if tokens is not None and len(ids(messages)) >= tokens:
                call.cancel()
                break
        return messages


def ids(messages: list[pb.GenerateResponse], choice: int = 0) -> list[int]:
    return [token for m in messages if m.delta.choice == choice for token in m.delta.token_ids]


def text(messages: list[pb.GenerateResponse], choice: int = 0) -> str:
    return "".join(m.delta.text for m in messages if m.delta.choice == choice)


def resumed(request: pb.GenerateRequest, messages: list[pb.GenerateResponse]) -> pb.GenerateRequest:
    """The request that goes on behind some messages of its first stream."""
    again = pb.GenerateRequest()
    again.CopyFrom(request)
    accepted = messages[0].accepted
    again.resume.token = accepted.resume_token
    for choice in range(accepted.sampling.n):
        again.resume.choices.add(
            token_ids=ids(messages, choice),
            text_bytes=len(text(messages, choice).encode()),
            finished=any(m.HasField("finished") and m.finished.choice == choice for m in messages),
        )
    return again


@pytest.fixture
def wire(pair: RunningStack) -> Iterator[Wire]:
    wire = Wire(pair.address)
    yield wire
    wire.channel.close()


CHAT = pb.GenerateRequest(
    sampling=pb.SamplingParams(n=2), stop=pb.StopOptions(max_tokens=60), request_id="a chat".replace(" ", "-")
)
CHAT.chat.messages.add(role=1, content="Be brief.")
CHAT.chat.messages.add(role=2, content="Why is the sky blue?")


def test_what_was_left_to_defaults_is_kept(wire: Wire) -> None:
    request = pb.GenerateRequest()
    request.CopyFrom(CHAT)
    request.ClearField("request_id")  # so that the seed is drawn, not derived
    first = wire.read(request, tokens=20)
    again = wire.read(resumed(request, first))
    accepted, before = again[0].accepted, first[0].accepted
    assert len(before.resume_token) <= 1024
    assert (accepted.sampling, accepted.stop, accepted.numerics_id) == (
        before.sampling,
        before.stop,
        before.numerics_id,
    )
    pinned = pb.GenerateRequest()
    pinned.CopyFrom(request)
    pinned.sampling.seed = before.sampling.seed
    whole = wire.read(pinned)
    for choice in range(2):
        assert ids([*first, *again], choice) == ids(whole, choice)
        assert text([*first, *again], choice) == text(whole, choice)
    usage = {m.finished.choice: m.finished.usage for m in [*first, *again] if m.HasField("finished")}
    for message in whole:
        if message.HasField("finished"):
            assert usage[message.finished.choice].generated_tokens == message.finished.usage.generated_tokens


def test_a_stream_without_ids_is_generated_again_and_its_text_comes_once(wire: Wire) -> None:
    request = pb.GenerateRequest(
        text="the rain", sampling=pb.SamplingParams(seed=1), stop=pb.StopOptions(max_tokens=60, ignore_eos=True)
    )
    request.output.token_ids = False
    whole = wire.read(request)
    for cut in (2, len(whole) // 2, len(whole) - 1):
        first = whole[:cut]
        assert text(first) + text(wire.read(resumed(request, first))[1:]) == text(whole)


def test_what_has_ended_needs_no_worker(pair: RunningStack, wire: Wire) -> None:
    request = pb.GenerateRequest(
        text="the rain", sampling=pb.SamplingParams(seed=1), stop=pb.StopOptions(max_tokens=40, ignore_eos=True)
    )
    whole = wire.read(request)
    steps = [worker.info.worker_id for worker in workers(pair)]
    again = wire.read(resumed(request, whole[:-1]))
    assert [message.WhichOneof("event") for message in again] == ["accepted", "finished"]
    assert again[1].finished.usage.generated_tokens == 40
    assert again[1].finished.placement.worker == ""
    # Cut before the text that was held until the end.
    last = max(number for number, message in enumerate(whole) if message.delta.token_ids)
    again = wire.read(resumed(request, whole[: last + 1]))
    assert text([*whole[: last + 1], *again]) == text(whole)
    assert wire.read(resumed(request, whole))[1:] == []
    assert steps == [worker.info.worker_id for worker in workers(pair)]


@pytest.mark.usefixtures("braked")
def test_a_resume_supersedes_a_stream_that_lives_on(pair: RunningStack, wire: Wire, client: Client) -> None:
    request = pb.GenerateRequest(request_id="once", stop=pb.StopOptions(max_tokens=3000, ignore_eos=True))
    request.token_ids.ids.extend([1, 2, 3])
    call = wire.stub.Generate(request)
    messages = [next(call) for _ in range(5)]
    with pytest.raises(grpc.RpcError) as caught:
        next(wire.stub.Generate(request))
    assert QwireError.from_rpc(caught.value).reason == Reason.DUPLICATE_REQUEST_ID
    messages.append(next(call))
    again = wire.stub.Generate(resumed(request, messages))
    assert next(again).HasField("accepted")
    assert next(again).delta.token_index == len(ids(messages))
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:
            pass
    error = QwireError.from_rpc(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, Reason.SUPERSEDED)
    again.cancel()
    check_nothing_left(pair)


def test_a_resume_of_something_else_is_refused(wire: Wire) -> None:
    request = pb.GenerateRequest(stop=pb.StopOptions(max_tokens=20, ignore_eos=True))
    request.token_ids.ids.extend([1, 2, 3])
    good = resumed(request, wire.read(request, tokens=5))

    def refusal(**changes: object) -> QwireError:
        bad = pb.GenerateRequest()
        bad.CopyFrom(good)
        bad.MergeFrom(pb.GenerateRequest(**changes))  # type: ignore[arg-type]
        with pytest.raises(grpc.RpcError) as caught:
            wire.read(bad)
        return QwireError.from_rpc(caught.value)

    for error in (
        refusal(token_ids={"ids": [4]}),
        refusal(sampling=pb.SamplingParams(temperature=0.123)),
        refusal(stop=pb.StopOptions(strings=["x"])),
        refusal(resume=pb.Resume(token=b"forged")),
    ):
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.RESUME_MISMATCH)
    error = refusal(resume=pb.Resume(choices=[pb.ResumeChoice()]))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == ["resume.choices"]
    with pytest.raises(grpc.RpcError) as caught:
        wire.stub.GenerateOnce(pb.GenerateOnceRequest(request=good))
    assert [v.field for v in QwireError.from_rpc(caught.value).violations] == ["request.resume"]


def test_another_fleets_tokens_are_refused(pair: RunningStack, wire: Wire) -> None:
    request = pb.GenerateRequest(stop=pb.StopOptions(max_tokens=20, ignore_eos=True))
    request.token_ids.ids.extend([1, 2, 3])
    good = resumed(request, wire.read(request, tokens=5))
    with another_router(pair, "--fleet-secret", "ours") as router:
        stranger = Wire(router.address)
        with pytest.raises(grpc.RpcError) as caught:
            stranger.read(good)
        assert QwireError.from_rpc(caught.value).reason == Reason.RESUME_MISMATCH
        stranger.channel.close()


def test_the_only_router_is_killed_and_started_again(pair: RunningStack, references: References, brake: Path) -> None:
    with load(pair.address, [{**GREEDY, "timeout": 90}], brake) as running:
        running.wait_for_tokens(20)
        os.kill(pair.pids["router"], signal.SIGKILL)
    check(running.records, references)
    check_nothing_left(pair)
