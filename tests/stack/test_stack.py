"""The supervisor, with stand-ins for the services."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from qwire.stack import RestartPolicy, Stack, StackError
from tests.stack.run_stack import config

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Stage:
    """The folder through which the stand-ins talk with the test."""

    folder: Path

    def events(self, *kinds: str) -> list[str]:
        """Events of these kinds in order, as "NAME KIND"."""
        return [f"{name} {kind}" for name, kind, _ in self._all() if kind in kinds]

    def details(self, name: str, kind: str) -> list[str]:
        return [rest for n, k, rest in self._all() if (n, k) == (name, kind)]

    def served_again(self, name: str, times: int) -> bool:
        return self.events("serving").count(f"{name} serving") > times

    def tell(self, what: str, text: str = "") -> None:
        (self.folder / what).write_text(text)

    def untell(self, what: str) -> None:
        (self.folder / what).unlink()

    def _all(self) -> list[tuple[str, str, str]]:
        path = self.folder / "events"
        lines = path.read_text().splitlines() if path.exists() else []
        parts = [line.split(" ", 2) for line in lines]
        return [(part[0], part[1], part[2] if len(part) > 2 else "") for part in parts]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("FAKE_STACK", str(tmp_path))
    return Stage(tmp_path)


def quiet(line: str) -> None:
    pass


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


async def test_order_flags_and_cleaning_up(stage: Stage) -> None:
    lines: list[str] = []
    settings = config(workers=2, worker_flags=["--dtype", "float32"], router_flags=["--extra"])
    async with Stack(settings, log=lines.append) as stack:
        assert list(stack.pids) == ["tokenizer", "worker-0", "worker-1", "router"]
        assert all(alive(pid) for pid in stack.pids.values())
        address, folder = stack.address, Path(stack.admin_address.removeprefix("unix:")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert address.startswith("127.0.0.1:")
        assert address != "127.0.0.1:0"
        async with grpc.aio.insecure_channel(address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 5)
        pids = stack.pids.values()
    assert not any(alive(pid) for pid in pids)
    assert not folder.exists()
    order = stage.events("serving", "start")
    assert order.index("router start") == 6  # All others serve by then.
    model = "--model /model --served-model-name fake"
    assert stage.details("tokenizer", "argv") == [f"{model} --listen unix:{folder}/tokenizer.sock"]
    assert stage.details("worker-1", "argv") == [f"{model} --dtype float32 --listen unix:{folder}/worker-1.sock"]
    assert stage.details("router", "argv") == [
        f"--admin-listen unix:{folder}/admin.sock --drain-delay 0 --tokenizer unix:{folder}/tokenizer.sock "
        f"--worker unix:{folder}/worker-0.sock --worker unix:{folder}/worker-1.sock --extra --listen 127.0.0.1:0"
    ]
    assert "[worker-0] hello" in lines


async def test_the_router_drains_first(stage: Stage) -> None:
    stack = Stack(config(), log=quiet)
    await stack.__aenter__()
    stage.tell("router.busy")
    leaving = asyncio.create_task(stack.__aexit__(None, None, None))
    await until(lambda: stage.events("draining") == ["router draining"])
    await asyncio.sleep(0.2)
    assert stage.events("draining", "end") == ["router draining"]
    stage.untell("router.busy")
    await leaving
    events = stage.events("draining", "end")
    assert events[:2] == ["router draining", "router end"]
    assert sorted(events[2:]) == ["tokenizer draining", "tokenizer end", "worker-0 draining", "worker-0 end"]


async def test_what_does_not_drain_in_time_is_killed(stage: Stage) -> None:
    lines: list[str] = []
    stage.tell("router.busy")
    stage.tell("worker-0.busy")
    async with Stack(config(router_grace=0.2, service_grace=0.2), log=lines.append) as stack:
        pids = stack.pids.values()
    assert not any(alive(pid) for pid in pids)
    assert stage.events("end") == ["tokenizer end"]
    assert "router didn't stop within 0.2 s: killing it" in lines


@pytest.mark.parametrize("name", ["tokenizer", "worker-0", "router"])
async def test_a_killed_service_comes_back(stage: Stage, name: str) -> None:
    async with Stack(config(), log=quiet) as stack:
        address = stack.address
        for round_ in range(2):
            before = stack.pids
            served = stage.events("serving").count(f"{name} serving")
            assert served == round_ + 1
            os.kill(before[name], signal.SIGKILL)
            await until(functools.partial(stage.served_again, name, served))
            assert stack.pids[name] != before[name]
            assert {**stack.pids, name: 0} == {**before, name: 0}  # The others were left alone.
        assert stack.address == address
    argv = stage.details(name, "argv")
    assert len(argv) == 3
    assert argv[1] == argv[2]
    if name == "router":
        assert argv[1].endswith(f"--listen {address}")


async def test_what_a_dead_service_left_behind_is_killed(stage: Stage) -> None:
    stage.tell("worker-0.grandchild")
    async with Stack(config(), log=quiet) as stack:
        (grandchild,) = stage.details("worker-0", "grandchild")
        os.kill(stack.pids["worker-0"], signal.SIGKILL)
        await until(lambda: not alive(int(grandchild)))
        await until(lambda: len(stage.details("worker-0", "start")) == 2)


@pytest.mark.parametrize(
    ("status", "starts", "why"),
    [
        (2, 1, "exited with status 2: its settings are wrong"),
        (3, 1, "exited with status 3: the model can't be loaded"),
        (1, 3, "exited with status 1: 3 times, and was never ready"),
    ],
)
async def test_a_service_that_cannot_start(stage: Stage, status: int, starts: int, why: str) -> None:
    stage.tell("worker-0.exit", str(status))
    with pytest.raises(StackError) as caught:
        async with Stack(config(), log=quiet):
            pytest.fail("it started")
    assert str(caught.value) == f"worker-0 {why}\n  cannot go on: the reason"
    assert len(stage.details("worker-0", "start")) == starts
    assert not stage.details("router", "start")
    # The tokenizer service may have been ended before it said that it had started.
    assert not any(alive(int(pid)) for pid in stage.details("tokenizer", "start"))


async def test_failing_for_good_later_ends_the_wait(stage: Stage) -> None:
    async with Stack(config(), log=quiet) as stack:
        stage.tell("worker-0.exit", "3")
        os.kill(stack.pids["worker-0"], signal.SIGKILL)
        with pytest.raises(StackError, match="the model can't be loaded"):
            await asyncio.wait_for(stack.wait(), 20)


async def test_a_service_that_is_never_ready(stage: Stage) -> None:
    stage.tell("worker-0.never-ready")
    policy = RestartPolicy(first_delay=0.01, start_attempts=1, start_timeout=5)
    with pytest.raises(StackError, match=r"worker-0 was killed by SIGKILL: 1 times"):
        async with Stack(config(restart=policy), log=quiet):
            pytest.fail("it started")


def test_workers_are_counted() -> None:
    with pytest.raises(ValueError, match="workers"):
        config(workers=0)


def start(stage: Stage) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.stack.run_stack"],
        cwd=ROOT,
        env={**os.environ, "FAKE_STACK": str(stage.folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pids(stage: Stage) -> list[int]:
    return [int(stage.details(name, "start")[-1]) for name in ("tokenizer", "worker-0", "router")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_drains(stage: Stage, number: signal.Signals) -> None:
    with start(stage) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready on 127.0.0.1:")
        children = pids(stage)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert stage.events("end")[0] == "router end"
    assert len(stage.events("end")) == 3
    assert not any(alive(pid) for pid in children)
    assert "[router] hello" in errors


def test_a_log_that_nobody_reads_stalls_nothing(stage: Stage) -> None:
    # Each stand-in logs 200 kB, and a pipe holds 64.
    with start(stage) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(pids(stage)[1], signal.SIGKILL)
        wait_until(lambda: len(stage.details("worker-0", "start")) == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_second_signal_kills(stage: Stage) -> None:
    stage.tell("router.busy")
    with start(stage) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        wait_until(lambda: stage.events("draining") == ["router draining"])
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 0
    assert stage.events("end") == []
    assert not any(alive(pid) for pid in pids(stage))


def test_a_signal_while_starting(stage: Stage) -> None:
    stage.tell("worker-0.never-ready")
    with start(stage) as process:
        wait_until(lambda: len(stage.events("serving")) == 2)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "")
    started = [int(stage.details(name, "start")[0]) for name in ("tokenizer", "worker-0")]
    assert not any(alive(pid) for pid in started)


def test_the_terminal_reaches_only_the_supervisor(stage: Stage) -> None:
    with start(stage) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert {os.getsid(pid) for pid in pids(stage)} == set(pids(stage))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert stage.events("interrupted") == []


def test_no_orphans_when_the_supervisor_is_killed(stage: Stage) -> None:
    with start(stage) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = pids(stage)
        assert all(alive(pid) for pid in children)
        process.kill()
        process.communicate(timeout=20)
    wait_until(lambda: not any(alive(pid) for pid in children), 5)
    # Nobody is left to remove the folder of the sockets.
    shutil.rmtree(Path(stage.details("router", "argv")[0].split()[1].removeprefix("unix:")).parent)


def test_a_start_that_fails_says_why(stage: Stage) -> None:
    stage.tell("tokenizer.exit", "3")
    with start(stage) as process:
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors.endswith("tokenizer exited with status 3: the model can't be loaded\n  cannot go on: the reason\n")
