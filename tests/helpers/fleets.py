"""Fleets of fake workers and routers as processes, each pinned to a core where that is wanted. No model, no tokenizer
service unless one is started: requests give ids and want ids."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qwire import _child
from qwire.v1 import admin_pb2, admin_pb2_grpc

START_SECONDS = 60


@dataclass
class Service:
    """One process, and where it listens."""

    name: str
    process: subprocess.Popen[bytes]
    address: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def cpu_seconds(self) -> float:
        """What the process has used so far, in user and system mode."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self) -> int:
        """Bytes that the process has in memory and shares with no other."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def wait_until_serving(self) -> None:
        """Raises RuntimeError, with the log, where it doesn't come to that."""
        deadline = time.monotonic() + START_SECONDS
        with grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while self.process.poll() is None and time.monotonic() < deadline:
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
                except grpc.RpcError:
                    continue
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                time.sleep(0.02)
        raise RuntimeError(f"{self.name} didn't start:\n{self.log.read_text()}")


@dataclass
class Fleet:
    """Processes in one folder of unix sockets and logs."""

    folder: Path
    services: dict[str, Service] = field(default_factory=dict)

    def start(self, name: str, module: str, *flags: str, core: int | None = None) -> Service:
        """Starts `python -m module serve`, on one core if it is given; doesn't wait for it."""
        address = f"unix:{self.folder}/{name}.sock"
        argv = [sys.executable, "-m", module, "serve", "--listen", address, *flags]
        if core is not None:
            argv = ["taskset", "--cpu-list", str(core), *argv]
        log = self.folder / f"{name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(_child.command(argv), stdout=file, stderr=file)
        self.services[name] = Service(name, process, address, log)
        return self.services[name]

    def start_worker(self, number: int, *flags: str, core: int | None = None) -> Service:
        name = f"worker-{number}"
        return self.start(name, "worker.fake", "--worker-id", name, *flags, core=core)

    def start_router(self, number: int, *flags: str, core: int | None = None) -> Service:
        """On all workers that were started, and the service named tokenizer or none."""
        targets = [flag for name in self.named("worker") for flag in ("--worker", self.services[name].address)]
        admin = f"unix:{self.folder}/admin-{number}.sock"
        tokenizer = f"unix:{self.folder}/tokenizer.sock"
        return self.start(
            f"router-{number}",
            "router",
            *targets,
            "--tokenizer",
            tokenizer,
            "--admin-listen",
            admin,
            *flags,
            core=core,
        )

    def named(self, kind: str) -> list[str]:
        return [name for name in self.services if name.startswith(kind)]

    def workers(self, router: int = 0) -> list[admin_pb2.WorkerStatus]:
        """What a router says of its workers."""
        with grpc.insecure_channel(f"unix:{self.folder}/admin-{router}.sock") as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            return list(stub.ListWorkers(admin_pb2.ListWorkersRequest(), timeout=5).workers)

    def stop(self) -> None:
        for service in self.services.values():
            service.process.send_signal(signal.SIGKILL)
        for service in self.services.values():
            service.process.wait(10)


@contextmanager
def fake_fleet(
    folder: Path,
    *,
    workers: int = 2,
    routers: int = 1,
    worker_flags: Sequence[str] = (),
    router_flags: Sequence[str] = (),
    router_core: int | None = None,
    worker_core: int | None = None,
) -> Iterator[Fleet]:
    """Starts fake workers and routers, and waits until every router has every worker."""
    fleet = Fleet(folder)
    try:
        for number in range(workers):
            fleet.start_worker(number, *worker_flags, core=worker_core)
        for number in range(routers):
            fleet.start_router(number, *router_flags, core=router_core)
        for service in fleet.services.values():
            service.wait_until_serving()
        for number in range(routers):
            while not all(worker.ready for worker in fleet.workers(number)):
                time.sleep(0.02)
        yield fleet
    finally:
        fleet.stop()
        for service in fleet.services.values():
            print(f"[{service.name}]\n{service.log.read_text()}")  # shown for tests that fail
