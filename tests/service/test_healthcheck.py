"""`python -m qwire.service.healthcheck` as container engines run it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qwire.service.healthcheck import status
from qwire.service.server import HEALTH_SERVICE, Listener, Server

COMMAND = [sys.executable, "-m", "qwire.service.healthcheck"]


async def run(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(*COMMAND, *arguments, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[Server, str]]:
    address = f"unix:{tmp_path}/s"
    server = Server(Listener(address), max_message_bytes=1 << 20, announce=False)
    await server.start()
    yield server, address
    await server.stop(0)


async def test_serving_or_not(server: tuple[Server, str]) -> None:
    one, address = server
    assert await run(address) == (1, "NOT_SERVING\n")
    await one.set_serving(True)
    assert await run(address) == (0, "SERVING\n")
    assert await run(address, "--service", HEALTH_SERVICE) == (0, "SERVING\n")
    assert await run(address, "--service", "qwire.v1.Missing") == (1, "NOT_FOUND\n")


async def test_draining(server: tuple[Server, str]) -> None:
    one, address = server
    await one.set_serving(True)
    await one.health.enter_graceful_shutdown()
    assert await run(address) == (1, "NOT_SERVING\n")


async def test_a_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = Server(Listener("127.0.0.1:0"), max_message_bytes=1 << 20, announce=False)
    address = await server.start()
    await server.set_serving(True)
    assert await run(address) == (0, "SERVING\n")
    await server.stop(0)


def test_nobody_there(tmp_path: Path) -> None:
    assert status(f"unix:{tmp_path}/none", "") == "UNAVAILABLE"
    result = subprocess.run([*COMMAND, "127.0.0.1:1"], capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stdout) == (1, "UNAVAILABLE\n")


def test_a_server_that_hangs(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/s")
        listening.listen()
        assert status(f"unix:{tmp_path}/s", "", timeout=0.3) == "DEADLINE_EXCEEDED"


def test_it_imports_nothing_heavy() -> None:
    script = "import qwire.service.healthcheck, sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "tokenizers", "click", "qwire.client", "qwire.service.server"}
    assert not heavy & set(result.stdout.split())
