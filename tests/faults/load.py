"""Clients that record what they got, and the one checker for all of it.

A request is checked against its reference: what the same request gave when nothing was broken. Numerics are equal over
all workers of a test, so whatever happens to processes, no stream may differ from it by a token or a byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from qwire import Client, QwireError
from qwire.v1 import generation_pb2 as pb
from tests.helpers.stacks import RunningStack, eventually

DEADLINE_SLACK_SECONDS = 0.25

Options = dict[str, Any]


@dataclass
class Record:
    """One request, as its client saw it."""

    options: Options
    ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    finished: dict[int, pb.Finished] = field(default_factory=dict)
    accepted: int = 0
    statuses: list[grpc.StatusCode] = field(default_factory=list)
    error: QwireError | None = None
    started: float = 0.0
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """When each delta came, on the monotonic clock."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids.values()))

    def gap(self, since: float) -> float:
        """The longest pause that includes time after `since`, in seconds."""
        times = [time for time in self.arrivals if time >= since]
        before = max((time for time in self.arrivals if time < since), default=since)
        return max((later - earlier for earlier, later in zip([before, *times], times, strict=False)), default=0.0)


def run(client: Client, options: Options, record: Record) -> Record:
    """Reads one stream to its end; whatever that is goes into the record."""
    record.started = time.monotonic()
    try:
        for response in client.generate(**options).responses():
            match response.WhichOneof("event"):
                case "accepted":
                    record.accepted += 1
                case "delta":
                    delta = response.delta
                    assert delta.token_index == len(record.ids.setdefault(delta.choice, []))
                    assert delta.text_offset == len(record.text.setdefault(delta.choice, "").encode())
                    record.ids[delta.choice] += delta.token_ids
                    record.text[delta.choice] += delta.text
                    record.arrivals.append(time.monotonic())
                case "finished":
                    assert response.finished.choice not in record.finished
                    record.finished[response.finished.choice] = response.finished
        record.statuses.append(grpc.StatusCode.OK)
    except QwireError as error:
        record.error = error
        record.statuses.append(error.code)
    record.ended = time.monotonic()
    return record


class Load:
    """Requests that run at once, each with a client of its own.

    Args:
        brake: what slows the workers down until `go_on`, so that streams are still running when a fault comes.
    """

    def __init__(self, address: str | Sequence[str], requests: Iterable[Options], brake: Path | None = None) -> None:
        self.records = [Record(options) for options in requests]
        self._address = address
        self._brake = brake
        self._pool = ThreadPoolExecutor(len(self.records))
        self._futures: list[Future[Record]] = []

    def start(self) -> None:
        if self._brake is not None:
            self._brake.touch()
        for record in self.records:
            self._futures.append(self._pool.submit(self._run, record))

    def _run(self, record: Record) -> Record:
        with Client(self._address) as client:
            return run(client, record.options, record)

    def wait_for_tokens(self, count: int) -> None:
        """Until every request has so many."""
        self.wait_until(lambda: all(record.tokens >= count for record in self.records))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        over = [record.error for record in self.records if record.error is not None]
        assert eventually(condition, 60), f"it never came to that; ended: {over}"

    def go_on(self) -> None:
        """Takes the brake off."""
        if self._brake is not None:
            self._brake.unlink(missing_ok=True)

    def finish(self) -> list[Record]:
        self.go_on()
        try:
            return [future.result(100) for future in self._futures]
        finally:
            self._pool.shutdown()


@contextmanager
def load(address: str | Sequence[str], requests: Iterable[Options], brake: Path | None = None) -> Iterator[Load]:
    """A load that has been started, and is over when the block is left; until then the brake is on."""
    running = Load(address, requests, brake)
    running.start()
    try:
        yield running
    finally:
        running.finish()


class References:
    """What requests give when nothing is broken, each asked for once."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: dict[str, Record] = {}

    def of(self, options: Options) -> Record:
        plain = {name: value for name, value in options.items() if name not in ("timeout", "request_id")}
        key = repr(sorted(plain.items()))
        if key not in self._known:
            record = run(self._client, plain, Record(plain))
            assert record.error is None, "a reference must be whole"
            self._known[key] = record
        return self._known[key]


def check(records: Iterable[Record], references: References, *, allowed: Sequence[grpc.StatusCode] = ()) -> None:
    """One terminal status a request, OK unless another is allowed; streams equal to their reference if OK, else a
    prefix of it; none past its deadline."""
    for record in records:
        assert len(record.statuses) == 1, record.options
        (status,) = record.statuses
        assert status is grpc.StatusCode.OK or status in allowed, (record.options, record.error)
        assert record.accepted == 1 or (record.accepted == 0 and status is not grpc.StatusCode.OK)
        reference = references.of(record.options)
        whole = status is grpc.StatusCode.OK
        for choice, ids in reference.ids.items():
            got = record.ids.get(choice, [])
            assert got == (ids if whole else ids[: len(got)]), f"ids of choice {choice} of {record.options}"
            text = record.text.get(choice, "")
            assert text == reference.text[choice] if whole else reference.text[choice].startswith(text)
        if whole:
            assert record.finished.keys() == reference.finished.keys()
            for choice, finished in record.finished.items():
                expected = reference.finished[choice]
                assert (finished.reason, finished.stop_string) == (expected.reason, expected.stop_string)
                assert finished.usage.generated_tokens == expected.usage.generated_tokens
                assert finished.placement.exact
        if (timeout := record.options.get("timeout")) is not None:
            assert record.ended - record.started <= timeout + DEADLINE_SLACK_SECONDS


def check_nothing_left(*stacks: RunningStack) -> None:
    """No stream, request or block is held any more."""

    def clean() -> bool:
        states = [stack.state() for stack in stacks]
        held = ("active_streams", "blocks_in_use", "requests_running", "requests_waiting")
        return all(getattr(state, name) == 0 for state in states for name in held)

    assert eventually(clean, 5), [stack.state() for stack in stacks]
