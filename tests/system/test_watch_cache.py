"""From a worker's engine over WatchCache to a router's index: always what a lookup on the worker would hit."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwire.errors import QwireError, Reason
from qwire.service.server import Listener, Server
from qwire.v1 import models_pb2, worker_pb2_grpc
from qwire.v1 import worker_pb2 as pb
from router.cache_index import CacheIndex
from tests.helpers.fake_runner import FakeRunner
from worker import cache_feed
from worker.cache_feed import CacheFeed
from worker.engine.block_pool import CacheChanges
from worker.engine.engine import Engine
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.face import WorkerFace

ROOT = bytes(16)
INFO = pb.WorkerInfo(worker_id="w", model=models_pb2.ModelInfo(name="m", vocab_size=1000, context_length=1000))
GONE = QwireError(grpc.StatusCode.UNAVAILABLE, "gone")


def name(number: int) -> bytes:
    return (number + 1).to_bytes(16, "little")


names = st.integers(0, 20).map(name)


def holds(index: CacheIndex, hashes: Iterable[bytes]) -> bool:
    """Whether that is all that the index holds."""
    keys = [int.from_bytes(name[:8], "little") for name in dict.fromkeys(hashes)]
    return len(index) == len(keys) and all(index.leading([key]) for key in keys)


async def read(feed: CacheFeed, index: CacheIndex) -> None:
    async for message in feed.messages():
        assert message.ByteSize() <= 2**20
        index.take(message)


@settings(deadline=None)
@given(
    snapshot=st.sets(names),
    steps=st.lists(st.dictionaries(names, st.booleans(), max_size=30), max_size=10),
    pauses=st.lists(st.booleans(), min_size=10, max_size=10),
    message_hashes=st.integers(1, 7),
)
async def test_an_index_follows_a_feed(
    snapshot: set[bytes], steps: list[dict[bytes, bool]], pauses: list[bool], message_hashes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_feed, "MESSAGE_HASHES", message_hashes)
        patch.setattr(cache_feed, "GATHER_SECONDS", 0)
        feed, index, held = CacheFeed(lambda watched: None), CacheIndex(), set(snapshot)
        reader = asyncio.create_task(read(feed, index))
        await asyncio.sleep(0)
        feed.take(None, CacheChanges([name(99)], []))  # from before the snapshot, and not to be counted
        feed.take(list(snapshot), CacheChanges([name(98)], []))
        for step, pause in zip(steps, pauses, strict=False):
            stored, removed = [n for n in step if step[n]], [n for n in step if not step[n]]
            feed.take(None, CacheChanges(stored, removed))
            held = (held | set(stored)) - set(removed)
            if pause:
                await asyncio.sleep(0)
        for _ in range(2 * (len(snapshot) + sum(map(len, steps)) + 2)):  # the loop's turns, were each hash a message
            await asyncio.sleep(0)
        assert index.complete
        assert holds(index, held)
        feed.end(GONE)
        with pytest.raises(QwireError):
            await reader


async def test_a_watcher_that_falls_behind_is_ended_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_feed, "BACKLOG_HASHES", 10)
    monkeypatch.setattr(cache_feed, "GATHER_SECONDS", 0)
    asked: list[bool] = []
    feed, index = CacheFeed(asked.append), CacheIndex()
    reader = asyncio.create_task(read(feed, index))
    slow = feed.messages()
    begun = asyncio.ensure_future(anext(slow))
    await asyncio.sleep(0)
    feed.take([name(1)] * 50, CacheChanges([], []))  # a snapshot is never too long
    assert (await begun).snapshot_end
    for number in range(6):
        feed.take(None, CacheChanges([name(2 * number)], [name(2 * number + 1)]))
        for _ in range(4):  # the loop's turns that one message takes
            await asyncio.sleep(0)
    with pytest.raises(QwireError) as caught:
        await anext(slow)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.DATA_LOSS, Reason.SLOW_READER)
    await asyncio.sleep(0)
    assert len(index) == 6
    assert not reader.done()
    reader.cancel()
    await asyncio.wait([reader])
    assert asked == [True, True, False]  # nobody watches any more: the engine keeps no record


async def test_changes_are_told_at_once_and_then_together(monkeypatch: pytest.MonkeyPatch) -> None:
    feed, heard, pauses = CacheFeed(lambda watched: None), [], asyncio.Queue[float]()

    async def pause(seconds: float) -> None:
        pauses.put_nowait(seconds)
        await pauses.join()

    async def listen() -> None:
        async for message in feed.messages():
            heard.append((message.stored, message.removed))

    async def pass_by() -> None:
        """Ends the pause that follows a message, and lets what comes then happen."""
        assert pauses.get_nowait() == cache_feed.GATHER_SECONDS
        pauses.task_done()
        for _ in range(4):
            await asyncio.sleep(0)

    monkeypatch.setattr(cache_feed, "asyncio", SimpleNamespace(Event=asyncio.Event, sleep=pause))
    reader = asyncio.create_task(listen())
    await asyncio.sleep(0)
    feed.take([], CacheChanges([], []))
    await asyncio.sleep(0)
    await pass_by()
    feed.take(None, CacheChanges([name(1)], []))
    await asyncio.sleep(0)
    assert heard == [(b"", b""), (name(1), b"")]
    for number in range(2, 6):  # each is stored, and lost again in the next step
        feed.take(None, CacheChanges([name(number)], [name(number - 1)]))
        await asyncio.sleep(0)
    assert len(heard) == 2
    await pass_by()
    assert heard[2:] == [(name(5), b"".join(map(name, (1, 2, 3, 4))))]
    reader.cancel()


@pytest.fixture
async def engine() -> AsyncIterator[tuple[Engine, str]]:
    face = WorkerFace(INFO)
    engine = Engine(
        FakeRunner(24, 4),
        SchedulerLimits(16, 4),
        max_waiting=100,
        clock=time.monotonic,
        deliver=face.deliver,
        fault=face.fault,
    )
    face.attach(engine)
    server = Server(Listener("127.0.0.1:0"), max_message_bytes=1 << 20, announce=False)
    server.add(worker_pb2_grpc.add_WorkerServiceServicer_to_server, face, "qwire.v1.WorkerService")
    address = await server.start()
    engine.start()
    yield engine, address
    await asyncio.wait_for(face.drain(5), 5)
    await server.stop(0)
    await asyncio.to_thread(engine.stop)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_over_grpc_from_an_engine_at_work(engine: tuple[Engine, str], monkeypatch: pytest.MonkeyPatch) -> None:
    worker, address = engine
    chance, early, late = random.Random(3), CacheIndex(), CacheIndex()
    prompts = [[chance.randrange(2) for _ in range(chance.randrange(1, 60))] for _ in range(80)]

    def submit(number: int) -> None:
        worker.submit(Request(str(number), prompts[number], max_tokens=8, prefix_root=ROOT))

    async with grpc.aio.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        for number in range(20):
            submit(number)
        tasks = [asyncio.create_task(early.follow(stub))]
        await until(lambda: early.complete)
        for number in range(20, 80):
            submit(number)
            if number == 50:
                tasks.append(asyncio.create_task(late.follow(stub)))
            if number % 10 == 0:
                await asyncio.sleep(0.01)
        await until(lambda: worker.load.running == worker.load.waiting == 0 and late.complete)
        await until(lambda: holds(early, worker.pool.hashes()) and holds(late, worker.pool.hashes()))
        assert len(early)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert not len(early)
        await until(lambda: not worker._inbox.watched)


async def test_a_watch_that_ends_is_opened_again_with_a_snapshot(
    engine: tuple[Engine, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, address = engine
    index = CacheIndex()
    async with grpc.aio.insecure_channel(address) as channel:
        task = asyncio.create_task(index.follow(worker_pb2_grpc.WorkerServiceStub(channel)))
        await until(lambda: index.complete)
        monkeypatch.setattr(cache_feed, "BACKLOG_HASHES", 0)
        worker.submit(Request("a", [1] * 20, max_tokens=1, prefix_root=ROOT))
        await until(lambda: not index.complete)
        monkeypatch.undo()
        await until(lambda: index.complete)
        assert holds(index, worker.pool.hashes()) and len(index) == 5
        task.cancel()
        await asyncio.wait([task])
