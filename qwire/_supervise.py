"""One service as a child process: started, watched, and started again when it dies.

A service says `listening on ADDRESS` on standard output once its port is bound, answers grpc.health.v1 there, logs to
standard error, drains on SIGTERM, and exits with 2 when its settings are wrong and 3 when its model can't be loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import grpc

from qwire import _child
from qwire._channel import channel_options

LISTENING = "listening on "

_HOPELESS = {2: "its settings are wrong", 3: "the model can't be loaded"}
_KEPT_LINES = 20
_LONGEST_LINE = 64 * 1024
_EXIT_POLL_SECONDS = 1.0
_HEALTH_POLL_SECONDS = 0.05
_HEALTH_TIMEOUT_SECONDS = 2.0

Log = Callable[[str], None]


class StackError(Exception):
    """The services can't run; the message says why, with the last lines of the one that failed."""


@dataclass(frozen=True)
class RestartPolicy:
    """When a dead service is started again. Times are in seconds.

    Attributes:
        first_delay: wait before the first restart; doubles with each one.
        longest_delay: where doubling ends.
        reset_after: a service that lived this long starts over with `first_delay`.
        start_attempts: give up when a service that has never been ready died this often.
        start_timeout: a service that isn't ready by then is killed, and counts as dead.
    """

    first_delay: float = 0.2
    longest_delay: float = 5.0
    reset_after: float = 30.0
    start_attempts: int = 3
    start_timeout: float = 600.0


class Service:
    """A child process and its successors.

    Args:
        name: stands before each line that it logs.
        command: gives the command line for an address to listen on.
        listen: that address. Port 0 is replaced by the port that was bound, so that a restart keeps it.
    """

    def __init__(
        self, name: str, command: Callable[[str], Sequence[str]], listen: str, policy: RestartPolicy, log: Log
    ) -> None:
        self.name = name
        self.listen = listen
        self.ready = asyncio.Event()
        self._command = command
        self._policy = policy
        self._log = log
        self._stopping = asyncio.Event()
        self._bound = asyncio.Event()
        self._process: Process | None = None
        self._was_ready = False
        self._killed = False
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)

    @property
    def pid(self) -> int | None:
        """The process's id; None while there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def run(self) -> None:
        """Keeps the service running until `stop` or `kill`.

        Raises:
            StackError: starting it again makes no sense.
        """
        delay, deaths = self._policy.first_delay, 0
        clock = asyncio.get_running_loop().time
        while not self._stopping.is_set():
            started = clock()
            status = await self._live()
            if self._stopping.is_set():
                return
            deaths += 1
            self._give_up_if_hopeless(status, deaths)
            if clock() - started >= self._policy.reset_after:
                delay = self._policy.first_delay
            self._log(f"{self.name} {_ended(status)}: starting it again in {delay:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(2 * delay, self._policy.longest_delay)

    def terminate(self) -> None:
        """Asks the process to drain and exit; it isn't started again."""
        self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        """Kills the process with all that it started; it isn't started again."""
        self._killed = True
        self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            _kill_group(self._process.pid)

    def _give_up_if_hopeless(self, status: int, deaths: int) -> None:
        why = _HOPELESS.get(status)
        if why is None and not self._was_ready and deaths >= self._policy.start_attempts:
            why = f"{deaths} times, and was never ready"
        if why is not None:
            tail = "".join(f"\n  {line}" for line in self._last_lines)
            raise StackError(f"{self.name} {_ended(status)}: {why}{tail}")

    async def _live(self) -> int:
        """Runs one process from start to end; returns its exit status, negative for a signal."""
        self._bound.clear()
        self._last_lines.clear()
        # A session of its own: the terminal's Ctrl-C must reach the supervisor alone, for a drain has an order.
        process = await asyncio.create_subprocess_exec(
            *_child.command(self._command(self.listen)),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
        )
        self._process = process
        if self._stopping.is_set():  # Said while the process was being started.
            self.kill() if self._killed else process.terminate()
        readers = [
            asyncio.create_task(self._read(stream, take))
            for stream, take in ((process.stdout, self._on_output), (process.stderr, self._on_error))
            if stream is not None
        ]
        becoming_ready = asyncio.create_task(self._become_ready(process))
        try:
            await _exit_of(process)
        finally:
            self.ready.clear()
            becoming_ready.cancel()
            # Whatever the process started and left behind; it would hold ports and memory that the next one needs.
            _kill_group(process.pid)
            await asyncio.gather(becoming_ready, *readers, return_exceptions=True)
        return process.returncode if process.returncode is not None else 0

    async def _become_ready(self, process: Process) -> None:
        try:
            async with asyncio.timeout(self._policy.start_timeout):
                await self._bound.wait()
                await _until_serving(self.listen)
        except TimeoutError:
            self._log(f"{self.name} isn't ready after {self._policy.start_timeout:g} s: killing it")
            _kill_group(process.pid)
            return
        self._was_ready = True
        self.ready.set()

    async def _read(self, stream: asyncio.StreamReader, take: Callable[[str], None]) -> None:
        async for line in _lines(stream):
            take(line)

    def _on_output(self, line: str) -> None:
        if line.startswith(LISTENING) and not self._bound.is_set():
            self.listen = line.removeprefix(LISTENING).strip()
            self._bound.set()
        else:
            self._on_error(line)

    def _on_error(self, line: str) -> None:
        self._last_lines.append(line)
        self._log(f"[{self.name}] {line}")


async def _until_serving(address: str) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=channel_options(address)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_SECONDS)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_HEALTH_POLL_SECONDS)


async def _exit_of(process: Process) -> None:
    # Process.wait also waits for the pipes to close, in some versions of Python, and a grandchild may hold them.
    waiter = asyncio.create_task(process.wait())
    try:
        while process.returncode is None:
            await asyncio.wait({waiter}, timeout=_EXIT_POLL_SECONDS)
    finally:
        waiter.cancel()


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines without their ends; one that is too long comes in pieces, where StreamReader.readline would raise."""
    rest = b""
    while chunk := await stream.read(_LONGEST_LINE):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
        if len(rest) >= _LONGEST_LINE:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")


def _kill_group(pid: int) -> None:
    # The leader of a session leads the group of the same number.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _ended(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
