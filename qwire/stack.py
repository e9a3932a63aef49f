"""Everything on one machine: a tokenizer service, workers and a router, supervised.

    async with Stack(StackConfig(model=folder, served_model_name="demo")) as stack:
        print(stack.address)
        await stack.wait()

The services talk over unix sockets in a folder that only this user can enter; the router alone has an address that
others see. They live in sessions of their own, so Ctrl-C reaches only the supervisor, which stops the router first and
what the router needs after it; and they die with the supervisor, even if that is killed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from qwire._channel import DEFAULT_ADDRESS
from qwire._log import LineWriter
from qwire._supervise import Log, RestartPolicy, Service, StackError

__all__ = ["Commands", "RestartPolicy", "Stack", "StackConfig", "StackError", "serve"]

# Unix socket paths end at 107 bytes (unix(7)); the longest name in the folder is worker-NNN.sock.
_LONGEST_FOLDER = 107 - len("/worker-999.sock")


@dataclass(frozen=True)
class Commands:
    """How each service is started, without the verb and its flags."""

    tokenizer: Sequence[str] = (sys.executable, "-m", "tokenizer_svc")
    worker: Sequence[str] = (sys.executable, "-m", "worker")
    router: Sequence[str] = (sys.executable, "-m", "router")


@dataclass(frozen=True)
class StackConfig:
    """What to run.

    Attributes:
        model: the model's folder.
        served_model_name: what requests call it.
        listen: the router's address, "host:port" or "unix:/path"; port 0 picks a free one.
        workers: number of workers, each with the whole model.
        worker_flags: more command-line flags for the workers.
        router_flags: more command-line flags for the router.
        router_grace: seconds that the router has to finish running requests when the stack stops; more than its own
            --grace (30), after which it ends them in good order.
        service_grace: seconds that each of the others has after that.
        restart: when a dead service is started again.
        commands: how services are started.
    """

    model: Path
    served_model_name: str
    listen: str = DEFAULT_ADDRESS
    workers: int = 1
    worker_flags: Sequence[str] = ()
    router_flags: Sequence[str] = ()
    router_grace: float = 35.0
    service_grace: float = 10.0
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    commands: Commands = field(default_factory=Commands)

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= 999:
            raise ValueError(f"workers must be in [1, 999], not {self.workers}")


class Stack:
    """The running services. Entering it waits until all are ready, leaving it drains and stops them.

    Args:
        config: what to run.
        log: takes each line of the services, with the service's name before it, and the supervisor's own; None writes
            them to standard error.
    """

    def __init__(self, config: StackConfig, *, log: Log | None = None) -> None:
        self._config = config
        self._given_log = log
        self._writer: LineWriter | None = None
        self._folder: Path | None = None
        self._backends: list[Service] = []
        self._router: Service | None = None
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._killed = False

    @property
    def address(self) -> str:
        """The router's address, with the port that was bound."""
        if self._router is None:
            raise RuntimeError("the stack isn't running")
        return self._router.listen

    @property
    def admin_address(self) -> str:
        """Where the router serves AdminService."""
        return self._socket("admin")

    @property
    def pids(self) -> dict[str, int]:
        """Ids of the processes that live now, by service: "tokenizer", "worker-0" and on, "router"."""
        return {service.name: pid for service in self._services() if (pid := service.pid) is not None}

    async def wait(self) -> None:
        """Waits for ever, or until a service can't be kept running.

        Raises:
            StackError: which one, and why.
        """
        done, _ = await asyncio.wait(self._runs.values(), return_when=asyncio.FIRST_COMPLETED)
        for run in done:
            run.result()

    def kill(self) -> None:
        """Kills everything at once; what waits for the stack to stop goes on."""
        self._killed = True
        for service in self._services():
            service.kill()

    async def __aenter__(self) -> Self:
        if importlib.util.find_spec("grpc_health") is None:
            raise StackError('running services needs the serve extra: pip install "qwire[serve]"')
        if self._given_log is None:
            self._writer = LineWriter(sys.stderr.fileno())
        self._folder = _runtime_folder()
        try:
            await self._start()
        except BaseException:
            # Nothing has been served, so there is nothing to drain.
            self.kill()
            await self._clean_up()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._router is not None:
                await self._stop([self._router], self._config.router_grace)
            await self._stop(self._backends, self._config.service_grace)
        finally:
            self.kill()
            await self._clean_up()

    async def _start(self) -> None:
        config = self._config
        model = ["--model", str(config.model), "--served-model-name", config.served_model_name]
        self._launch("tokenizer", [*config.commands.tokenizer, "serve", *model])
        for index in range(config.workers):
            self._launch(f"worker-{index}", [*config.commands.worker, "serve", *model, *config.worker_flags])
        await self._until_ready(self._backends)
        # Nobody balances over one router: there is no one to wait for when it stops.
        argv = [*config.commands.router, "serve", "--admin-listen", self.admin_address, "--drain-delay", "0"]
        for service in self._backends:
            argv += ["--tokenizer" if service.name == "tokenizer" else "--worker", service.listen]
        self._router = self._run("router", [*argv, *config.router_flags], config.listen)
        await self._until_ready([self._router])

    def _launch(self, name: str, argv: Sequence[str]) -> None:
        self._backends.append(self._run(name, argv, self._socket(name)))

    def _run(self, name: str, argv: Sequence[str], listen: str) -> Service:
        service = Service(name, lambda address: [*argv, "--listen", address], listen, self._config.restart, self._log)
        self._runs[name] = asyncio.create_task(service.run(), name=name)
        return service

    async def _until_ready(self, services: Sequence[Service]) -> None:
        ready = asyncio.create_task(_all_ready(services))
        try:
            await asyncio.wait({ready, *self._runs.values()}, return_when=asyncio.FIRST_COMPLETED)
            for run in self._runs.values():
                if run.done():
                    run.result()
        finally:
            ready.cancel()

    async def _stop(self, services: Sequence[Service], grace: float) -> None:
        if not self._killed:
            for service in services:
                service.terminate()
        _, late = await asyncio.wait([self._runs[service.name] for service in services], timeout=grace)
        for service in services:
            if self._runs[service.name] in late:
                self._log(f"{service.name} didn't stop within {grace:g} s: killing it")
                service.kill()

    async def _clean_up(self) -> None:
        await asyncio.gather(*self._runs.values(), return_exceptions=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._writer is not None:
            await asyncio.to_thread(self._writer.close)

    def _log(self, line: str) -> None:
        if log := self._given_log or self._writer:
            log(line)

    def _services(self) -> list[Service]:
        return [*self._backends, *([self._router] if self._router is not None else [])]

    def _socket(self, name: str) -> str:
        if self._folder is None:
            raise RuntimeError("the stack isn't running")
        return f"unix:{self._folder}/{name}.sock"


async def serve(config: StackConfig, on_ready: Callable[[Stack], None], *, log: Log | None = None) -> None:
    """Runs a stack until SIGINT, SIGTERM or SIGHUP, which drain it; a second one kills it. For the main thread.

    Raises:
        StackError: a service couldn't be kept running.
    """
    stack = Stack(config, log=log)

    async def run() -> None:
        async with stack:
            on_ready(stack)
            await stack.wait()

    running = asyncio.create_task(run())
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            running.cancel()
        else:
            stack.kill()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    try:
        await running
    except asyncio.CancelledError:
        if not signals:
            raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)


async def _all_ready(services: Sequence[Service]) -> None:
    for service in services:
        await service.ready.wait()


def _runtime_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="qwire-")  # Mode 0700.
    if len(folder.encode()) > _LONGEST_FOLDER:
        shutil.rmtree(folder)
        folder = tempfile.mkdtemp(prefix="qwire-", dir="/tmp")
    return Path(folder)
