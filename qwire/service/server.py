"""A service's gRPC server: where it listens, how it answers health checks, and how it ends."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import ipaddress
import logging
import os
import signal
import stat
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from qwire.service import accepts
from qwire.service.accepts import Refusals
from qwire.service.boundary import Boundary
from qwire.service.config import ConfigError

log = logging.getLogger(__name__)

LAST_NEWS_SECONDS = 0.1
"""For those who watch a server's health to read NOT_SERVING before it ends their streams."""

GC_THRESHOLDS = 2_000, 20, 10
"""Of Python's garbage collector: how many more objects were made than freed when it looks at the young ones, which is
a matter of milliseconds; how many of these looks pass until one at older ones, a matter of tens; and so on."""

HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

# Noticing a stopped peer takes the ping timeout (60 s by default), whatever the keepalive timeout says. The option's
# name has no "recv" in it, and gRPC ignores names that it doesn't know.
LINK_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),  # a proxy that the environment names is for the world outside
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.http2.ping_timeout_ms", 1_500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.http2.ping_timeout_ms", 1_500),
    ("grpc.http2.min_ping_interval_without_data_ms", 300),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),  # or a second server shares the port silently
    ("grpc.enable_channelz", 0),  # books of every call that nothing here shows
    # Calls that the event loop hasn't come to yet. From 1,000 on gRPC drops some of them at random, and their callers
    # see CANCELLED; a service's own limits answer with a reason.
    ("grpc.server.max_pending_requests", 65_536),
    ("grpc.server.max_pending_requests_hard_limit", 65_536),
)


@dataclass(frozen=True)
class Listener:
    """Where to listen: `host:port` (port 0 takes a free one) or `unix:path`."""

    address: str
    insecure_bind: bool = False

    def check(self) -> None:
        """Refuses an address that others could reach: this release has no TLS."""
        if self.address.startswith("unix:"):
            return
        host, separator, port = self.address.rpartition(":")
        if not separator or not port.isdigit() or int(port) > 65535:
            raise ConfigError(f"--listen: {self.address!r} is neither host:port nor unix:path")
        if not (self.insecure_bind or _is_loopback(host.strip("[]"))):
            raise ConfigError(
                f"--listen: {self.address} can be reached by other machines, without TLS and without keys; "
                "use a loopback address or a unix socket, or say --insecure-bind"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server:
    """One gRPC server with health, reflection and the boundary before them. Starts NOT_SERVING.

    Args:
        refusals: of calls that there is no room for, which cost least if nothing of them is read.
        announce: prints the line `listening on ADDRESS` once the port is bound.
    """

    def __init__(
        self,
        listener: Listener,
        *,
        max_message_bytes: int,
        write_timeout: float = 10.0,
        refusals: Refusals | None = None,
        announce: bool = True,
        options: Sequence[tuple[str, int]] = (),
    ) -> None:
        listener.check()
        self._listener = listener
        self._announce = announce
        self._names: list[str] = [HEALTH_SERVICE, reflection.SERVICE_NAME]
        self._locks = AsyncExitStack()
        self.health = HealthServicer()
        self._boundary = Boundary(write_timeout)
        self._refusals = refusals
        self.grpc = accepts.server(
            refusals,
            handlers=[self._boundary],
            options=[
                *SERVER_OPTIONS,
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                *options,
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._boundary)

    def add(self, register: Callable[[Any, Any], None], servicer: Any, name: str) -> None:
        """Registers a servicer with its generated `add_…_to_server` function and its full service name."""
        register(servicer, self._boundary)
        self._names.append(name)

    async def start(self) -> str:
        """Binds and starts; returns the real address. Raises ConfigError where the address is taken."""
        await self.set_serving(False)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(self._names), self._boundary
        )
        # No others: grpc.aio waits anew, at every call, for those of each method that is registered by itself.
        for method in self._refusals.methods if self._refusals else ():
            service, name = method.removeprefix("/").split("/")
            self.grpc.add_registered_method_handlers(service, {name: self._boundary.methods[method]})
        address = self._listener.address
        if address.startswith("unix:"):
            self._take_socket(address.removeprefix("unix:"))
        try:
            port = self.grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"--listen: can't bind {address}: it is in use or not allowed") from error
        await self.grpc.start()
        if not address.startswith("unix:"):
            address = f"{address.rpartition(':')[0]}:{port}"
        if self._announce:
            print(f"listening on {address}", flush=True)  # noqa: T201 - read by whoever started us
        log.info("listening on %s", address)
        return address

    async def set_serving(self, serving: bool) -> None:
        """What health checks answer, for the server as a whole and for each of its services."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self.health.set(name, status)

    async def leave(self) -> None:
        """Turns health NOT_SERVING for good, and serves on: whoever watches it goes elsewhere."""
        await self.health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Turns health NOT_SERVING, takes no new calls, gives running ones up to `grace` seconds, and ends."""
        await self.health.enter_graceful_shutdown()
        asyncio.get_running_loop().call_later(LAST_NEWS_SECONDS, self._boundary.open_ended.end)
        await self.grpc.stop(grace)
        await self._locks.aclose()

    def _take_socket(self, path: str) -> None:
        # gRPC takes over a socket file that a live server listens on. The lock tells a live one from a stale one.
        try:
            lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"--listen: can't create {path}: {error.strerror}") from error
        self._locks.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"--listen: another server listens on unix:{path}") from error
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise ConfigError(f"--listen: {path} exists and is no socket")
            os.unlink(path)


async def until_signal(stopping: asyncio.Event | None = None) -> None:
    """Returns on SIGTERM or SIGINT, or when `stopping` is set."""
    event = stopping or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    await event.wait()


def run(main: Callable[[], Coroutine[Any, Any, int]], *, batch: bool = False) -> None:
    """Runs a service's coroutine on uvloop and exits with the status that it returns.

    Args:
        batch: its threads don't take a core from each other, or from others, at the moment they are woken. A call wakes
            three in turn, gRPC's two and the event loop's, and each would interrupt the one before at the first thing
            that there is to do, rather than find all of it when that one has nothing left.
    """
    import uvloop

    if batch and hasattr(os, "sched_setscheduler"):
        with suppress(OSError):  # some sandboxes don't let a process do it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # What the imports made lives as long as the process. A full collection that looked through it would hold the event
    # loop up for tens of milliseconds, now and then, in the midst of streams and refusals.
    gc.collect()
    gc.freeze()
    # What calls leave in cycles is young: a few of grpc.aio's objects for each.
    gc.set_threshold(*GC_THRESHOLDS)
    sys.exit(uvloop.run(main()))
