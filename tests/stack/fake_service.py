"""Stands in for a service: `fake_service.py NAME serve --listen ADDRESS ...`.

Appends what happens to it to $FAKE_STACK/events, and does what the files $FAKE_STACK/NAME.* say.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


def main() -> None:
    arguments = sys.argv[3:]
    listen = arguments[arguments.index("--listen") + 1]
    name = Path(listen).stem if listen.startswith("unix:") else "router"
    folder = Path(os.environ["FAKE_STACK"])

    def event(text: str) -> None:
        with (folder / "events").open("a") as file:
            file.write(f"{name} {text}\n")

    def told(what: str) -> str | None:
        path = folder / f"{name}.{what}"
        return path.read_text() if path.exists() else None

    event(f"start {os.getpid()}")
    event(f"argv {' '.join(arguments)}")
    if (status := told("exit")) is not None:
        sys.stderr.write("cannot go on: the reason\n")
        sys.exit(int(status))
    if told("grandchild") is not None:
        # Keeps the pipes open after its parent's death.
        child = subprocess.Popen(["sleep", "60"])
        event(f"grandchild {child.pid}")
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    port = server.add_insecure_port(listen)
    server.start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: event("interrupted"))
    print(f"listening on {listen if listen.startswith('unix:') else f'127.0.0.1:{port}'}", flush=True)
    time.sleep(0.1)
    sys.stderr.write("x" * 200_000 + "\nhello\n")
    event("serving")
    if told("never-ready") is None:
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    stop.wait()
    event("draining")
    while told("busy") is not None:
        time.sleep(0.02)
    server.stop(0).wait()
    event("end")


if __name__ == "__main__":
    main()
