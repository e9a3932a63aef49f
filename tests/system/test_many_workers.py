"""Two workers behind one router: requests go where their prefix is, and no worker idles while another queues."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import pytest

from qwire import Client, Generation
from qwire.v1 import admin_pb2, admin_pb2_grpc
from qwire.v1 import generation_pb2 as pb
from tests.helpers.stacks import RunningStack, eventually, running_stack

WORKER_FLAGS = ("--kv-cache-mib", "64", "--threads", "1")


def two_workers(
    model: Path, *router_flags: str, worker_flags: tuple[str, ...] = ()
) -> AbstractContextManager[RunningStack]:
    return running_stack(
        model, "tiny", workers=2, worker_flags=(*WORKER_FLAGS, *worker_flags), router_flags=router_flags
    )


@pytest.fixture(scope="module")
def pair(tiny_model: Path) -> Iterator[RunningStack]:
    with two_workers(tiny_model) as stack:
        wait_for_both(stack)
        yield stack


def workers(stack: RunningStack) -> list[admin_pb2.WorkerStatus]:
    with grpc.insecure_channel(stack.stack.admin_address) as channel:
        return list(admin_pb2_grpc.AdminServiceStub(channel).ListWorkers(admin_pb2.ListWorkersRequest()).workers)


def wait_for_both(stack: RunningStack) -> None:
    assert eventually(lambda: all(worker.ready for worker in workers(stack)), 40)


def generate(client: Client, prompt: list[int], count: int = 8, **more: object) -> Generation:
    return client.generate(
        token_ids=prompt,
        temperature=0,
        max_tokens=count,
        ignore_eos=True,
        **more,  # type: ignore[arg-type]
    ).read()


def finish(client: Client, prompt: list[int], count: int = 8, **more: object) -> pb.Finished:
    finished = generate(client, prompt, count, **more).finished
    assert finished is not None
    return finished


@pytest.mark.parametrize("count", [1, 24])
def test_sixteen_cold_streams_compute_a_shared_prefix_once_a_worker(pair: RunningStack, count: int) -> None:
    shared = [(7 * i + count) % 250 for i in range(600)]  # ends within a block
    prompts = [[*shared, 100 + number, 3, number] for number in range(16)]
    with pair.client() as client, ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: generate(client, prompt, count), prompts))
        alone = list(pool.map(lambda prompt: generate(client, prompt, count, bypass=True), prompts))
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    ends = [one.finished for one in together if one.finished is not None]
    computed = sum(end.usage.prompt_tokens - end.usage.cached_tokens for end in ends)
    print(f"computed {computed} tokens, on {sorted(Counter(end.placement.worker for end in ends).values())} streams")
    assert computed <= 2 * 600 + 16 * 3


def test_a_request_goes_where_its_prefix_is(pair: RunningStack) -> None:
    chance = random.Random(1)
    prompts = [[chance.randrange(250) for _ in range(320)] for _ in range(6)]
    with pair.client() as client:
        # Together, so that they spread.
        with ThreadPoolExecutor(6) as pool:
            homes = [end.placement.worker for end in pool.map(lambda prompt: finish(client, prompt, 150), prompts)]
        assert len(set(homes)) == 2
        for prompt, home in zip(prompts, homes, strict=True):
            end = finish(client, [*prompt, 7, 7, 7])
            assert end.placement.worker == home
            assert end.usage.cached_tokens == 320
            assert finish(client, [*prompt, 7], bypass=True).usage.cached_tokens == 0
            assert finish(client, [*prompt, 7], scope="another").usage.cached_tokens == 0


def cached_on_a_trace(stack: RunningStack) -> int:
    """Cached tokens of eight conversations of four turns each, in random order, one after another."""
    chance = random.Random(7)
    histories = [[chance.randrange(250) for _ in range(100)] for _ in range(8)]
    turns = [number for number in range(8) for _ in range(4)]
    chance.shuffle(turns)
    total = 0
    with stack.client() as client:
        for number in turns:
            total += finish(client, histories[number], 2).usage.cached_tokens
            histories[number] += [chance.randrange(250) for _ in range(48)]
    return total


def test_prefix_finds_more_than_round_robin(tiny_model: Path, pair: RunningStack) -> None:
    by_prefix = cached_on_a_trace(pair)
    with two_workers(tiny_model, "--placement", "round-robin") as stack:
        wait_for_both(stack)
        by_turns = cached_on_a_trace(stack)
    print(f"cached tokens: {by_prefix} by prefix, {by_turns} by turns")
    assert by_prefix > 1.2 * by_turns


def test_no_worker_idles_while_another_queues(tiny_model: Path) -> None:
    with two_workers(tiny_model, worker_flags=("--max-running", "4")) as stack, stack.client() as client:
        wait_for_both(stack)
        prompt = [(3 * i) % 250 for i in range(400)]
        finish(client, prompt)  # one of them holds it now: all eight would like to go there
        streams = [client.generate(token_ids=[*prompt, i], max_tokens=2000, ignore_eos=True) for i in range(8)]
        for stream in streams:
            stream.start()
        assert sorted(worker.streams for worker in workers(stack)) == [4, 4]
        for stream in streams:
            stream.cancel()
        assert eventually(lambda: stack.state().active_streams == 0, 10)


def test_a_worker_that_is_gone_gets_nothing_until_it_is_back(tiny_model: Path) -> None:
    with two_workers(tiny_model) as stack, stack.client() as client:
        wait_for_both(stack)
        prompt = [(5 * i) % 250 for i in range(400)]
        home = finish(client, prompt).placement.worker
        (index,) = (n for n, worker in enumerate(workers(stack)) if worker.info.worker_id == home)
        pid = stack.pids[f"worker-{index}"]
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not workers(stack)[index].ready, 5)
        end = finish(client, [*prompt, 1])
        assert end.placement.worker != home
        assert finish(client, [*prompt, 2]).usage.cached_tokens == 400
        assert eventually(lambda: stack.pids.get(f"worker-{index}", pid) != pid, 20)
        wait_for_both(stack)
        # What was held there is gone from the router's index too: the other one has it.
        assert finish(client, [*prompt, 3]).usage.cached_tokens == 400
