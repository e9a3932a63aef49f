"""Which process is which, how to break one, and routers beside that of a stack."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from qwire._supervise import LISTENING
from qwire.v1 import admin_pb2, admin_pb2_grpc
from tests.helpers.stacks import RunningStack, eventually


def workers(stack: RunningStack) -> list[admin_pb2.WorkerStatus]:
    """What the router sees, in order of the workers' numbers."""
    with grpc.insecure_channel(stack.stack.admin_address) as channel:
        return list(admin_pb2_grpc.AdminServiceStub(channel).ListWorkers(admin_pb2.ListWorkersRequest()).workers)


def wait_for_workers(stack: RunningStack) -> None:
    assert eventually(lambda: all(worker.ready for worker in workers(stack)), 60)


def busiest(stack: RunningStack) -> int:
    """The number of the worker with the most streams."""
    found = workers(stack)
    return max(range(len(found)), key=lambda number: found[number].streams)


def engine_pid(stack: RunningStack, number: int) -> int:
    """The process of a worker's rank 0, whose launcher starts another when it is gone."""
    return int(workers(stack)[number].info.worker_id.rpartition("-")[2])


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that is there and does nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@dataclass
class Router:
    """A router of the same fleet as a stack's."""

    process: subprocess.Popen[str]
    address: str

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextmanager
def another_router(stack: RunningStack, *flags: str) -> Iterator[Router]:
    """Starts a router on the workers and the tokenizer service of a stack."""
    targets = []
    for name in stack.pids:
        if name != "router":
            targets += ["--tokenizer" if name == "tokenizer" else "--worker", stack.stack._socket(name)]
    process = subprocess.Popen(
        [sys.executable, "-m", "router", "serve", "--listen", "127.0.0.1:0", *targets, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    lines: list[str] = []
    reader = threading.Thread(target=lines.extend, args=(process.stderr,))
    reader.start()
    try:
        line = process.stdout.readline()
        assert line.startswith(LISTENING), lines
        address = line.removeprefix(LISTENING).strip()
        assert eventually(lambda: sum("linked to worker" in line for line in lines) >= len(workers(stack)), 30)
        yield Router(process, address)
    finally:
        process.kill()
        process.wait(10)
        reader.join()
        process.stdout.close()
        process.stderr.close()
        print("".join(f"[another router] {line}" for line in lines))
