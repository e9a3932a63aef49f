"""Runs what compose.yaml names, without a container engine: the same commands, environment, health checks and order.

`Isolated` gives each service what a container would: names of the other services in a hosts file of its own, a root
file system that is read-only, a private /tmp, the volume at /models, uid 10001 and no capabilities; all in a network
of their own without a way out. It takes Linux namespaces, which some systems refuse to their users, but no root.

`Plain` needs nothing of the kind: it gives each service an address in 127.0.0.0/8 and puts that, and the volume's real
path, into the commands and the environment.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

ROOT = Path(__file__).parents[2]
UID = "10001"
START_SECONDS = 60
# The image's own environment, but for where its virtual environment is.
_PATH = f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
_IMAGE_ENVIRONMENT = {"PATH": _PATH, "HOME": "/tmp", "PYTHONUNBUFFERED": "1"}
# Its last act is `exec`, so that signals reach the service. A root that was changed by chroot would refuse `unshare`.
_CONTAINER = """
PATH=$PATH:/usr/sbin:/sbin  # pivot_root's, which not every user has
root=$1 volume=$2 access=$3 hosts=$4 cached=$5 kept=$6; shift 6
mount -t tmpfs tmpfs "$root"
for entry in /*; do
    [ "$entry" = /tmp ] || [ "$entry" = /models ] && continue
    if [ -L "$entry" ]; then cp -P "$entry" "$root"; continue; fi
    [ -d "$entry" ] || continue
    mkdir "$root$entry"
    mount --rbind "$entry" "$root$entry"
    case "$entry" in /proc | /dev) ;; *) mount -o remount,bind,ro "$root$entry" ;; esac
done
mkdir "$root/tmp" "$root/models"
mount -t tmpfs -o nosuid,nodev,noexec,mode=1777 tmpfs "$root/tmp"
for entry in $kept; do
    mkdir -p "$root$entry"
    mount --rbind "$entry" "$root$entry"
    mount -o remount,bind,ro "$root$entry"
done
mount --bind "$volume" "$root/models"
mount -o "remount,bind,$access" "$root/models"
if [ -n "$cached" ]; then
    mount --bind "$cached" "$root/models/cache/demo"
    mount -o remount,bind,ro "$root/models/cache/demo"
fi
mount --bind "$hosts" "$root/etc/hosts"
mount -o remount,bind,ro "$root"
cd "$root"
pivot_root . .
umount --lazy .
exec unshare --map-user=10001 --map-group=10001 setpriv --no-new-privs --pdeathsig KILL "$@"
"""
_LOOPBACK_UP = """
import fcntl, socket, struct, sys
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x41))  # SIOCSIFFLAGS: up and running
print("up", flush=True)
sys.stdin.read()
"""


def read_compose(environ: Mapping[str, str]) -> dict[str, Any]:
    """compose.yaml as `docker compose` reads it with these environment variables."""
    text = (ROOT / "compose.yaml").read_text()
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: environ.get(match[1]) or match[2], text)
    assert "$" not in text
    return yaml.safe_load(text)  # type: ignore[no-any-return]


class Engine(Protocol):
    """Where commands of services run."""

    address: str
    """Of the router's published port."""

    def command(self, service: str, argv: Sequence[str], environ: Mapping[str, str], access: str) -> list[str]:
        """What runs `argv` as a service does; as "host", with neither volume nor names."""
        ...


class Isolated:
    """Services in namespaces."""

    address = "127.0.0.1:50051"

    def __init__(self, folder: Path, volume: Path, names: Sequence[str], cached: Path | None) -> None:
        # An empty word stands for no folder.
        self._volume, self._cached = volume, str(cached or "")
        (folder / "root").mkdir()
        self._root, self._hosts = folder / "root", folder / "hosts"
        lines = [f"127.0.1.{index} {name}" for index, name in enumerate(names, 1)]
        self._hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self._network = subprocess.Popen(
            ["unshare", "--map-root-user", "--net", sys.executable, "-c", _LOOPBACK_UP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._network.stdout is not None
        assert self._network.stdout.readline() == b"up\n"

    def command(self, service: str, argv: Sequence[str], environ: Mapping[str, str], access: str) -> list[str]:
        enter = ["nsenter", f"--target={self._network.pid}", "--user", "--net", "--preserve-credentials"]
        run = ["env", "-i", *(f"{name}={value}" for name, value in environ.items()), *argv]
        if service == "host":
            return [*enter, *run]
        # For a checkout or a Python that lies in /tmp.
        kept = f"{ROOT} {sys.prefix} {sys.base_prefix}"
        paths = [str(self._root), str(self._volume), access, str(self._hosts), self._cached, kept]
        return [*enter, "unshare", "--mount", "sh", "-euc", _CONTAINER, "sh", *paths, *run]

    def close(self) -> None:
        self._network.communicate()


class Plain:
    """Services as they are, with addresses and paths of this machine."""

    def __init__(self, volume: Path, names: Sequence[str]) -> None:
        base = f"127.{20 + os.getpid() % 200}.{os.getpid() // 200 % 250}"
        self._volume = volume
        self._hosts = {name: f"{base}.{index}" for index, name in enumerate(names, 1)}
        self.address = f"{self._hosts['router']}:50051"

    def command(self, service: str, argv: Sequence[str], environ: Mapping[str, str], access: str) -> list[str]:
        words = [f"{name}={value}" for name, value in environ.items()] + list(argv)
        if service != "host":
            words = [self._here(service, word) for word in words]
        return ["setpriv", "--pdeathsig", "KILL", "env", "-i", *words]

    def close(self) -> None:
        pass

    def _here(self, service: str, word: str) -> str:
        word = word.replace("/models", str(self._volume))
        own = re.sub(r"(0\.0\.0\.0|127\.0\.0\.1)(?=:\d)", self._hosts.get(service.split("-")[0], ""), word)
        return re.sub(r"([a-z]+)(?=:\d)", lambda match: self._hosts[match[1]], own)


class Project:
    """The services of compose.yaml that a profile names."""

    def __init__(self, compose: dict[str, Any], profile: str, engine: Engine, logs: Path) -> None:
        self.services: dict[str, Any] = {
            name: service
            for name, service in compose["services"].items()
            if profile in service.get("profiles", [profile])
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._engine, self._logs = engine, logs

    def up(self) -> None:
        """Starts everything, as depends_on says, until the health checks pass."""
        for name in self.services:
            self._start(name)
        for name in self.processes:
            self._await(name, "service_healthy" if "healthcheck" in self.services[name] else "")

    def run(self, name: str, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Runs a command as in a service's container, or on the host."""
        return subprocess.run(self._command(name, argv), capture_output=True, text=True, timeout=60)

    def start_again(self, name: str) -> int:
        """Runs a service that ends; returns its exit status."""
        return self._popen(name).wait(60)

    def down(self) -> dict[str, int]:
        """Stops what runs, each service before those it depends on; returns the exit statuses."""
        statuses = {}
        for name in reversed(list(self.processes)):
            process = self.processes[name]
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                statuses[name] = process.wait(float(self.services[name].get("stop_grace_period", "10s").rstrip("s")))
            except subprocess.TimeoutExpired:
                process.kill()
                statuses[name] = process.wait()
        return statuses

    def logs(self) -> str:
        """What all services wrote, each line after its service's name."""
        files = sorted(self._logs.iterdir())
        return "\n".join(f"{file.stem}: {line}" for file in files for line in file.read_text().splitlines())

    def _start(self, name: str) -> None:
        if name in self.processes:
            return
        for other, dependency in self.services[name].get("depends_on", {}).items():
            if other in self.services:
                self._start(other)
                self._await(other, dependency["condition"])
            else:
                assert dependency["required"] is False
        self.processes[name] = self._popen(name)

    def _popen(self, name: str) -> subprocess.Popen[bytes]:
        with (self._logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(self._command(name, self.services[name]["command"]), stdout=log, stderr=log)

    def _await(self, name: str, condition: str) -> None:
        process = self.processes[name]
        if condition == "service_completed_successfully":
            assert process.wait(START_SECONDS) == 0
        elif condition == "service_healthy":
            kind, *argv = self.services[name]["healthcheck"]["test"]
            assert kind == "CMD"
            deadline = time.monotonic() + START_SECONDS
            while self.run(name, argv).returncode:
                assert process.poll() is None, f"{name} ended"
                assert time.monotonic() < deadline, f"{name} isn't healthy"
                time.sleep(0.3)

    def _command(self, name: str, argv: Sequence[str]) -> list[str]:
        service = self.services.get(name, {})
        environ = dict(_IMAGE_ENVIRONMENT)
        # One that has no value is handed on from the environment of `docker compose`, where it isn't set.
        environ |= {key: value for key, value in service.get("environment", {}).items() if value is not None}
        access = "ro" if any(volume.endswith(":ro") for volume in service.get("volumes", [])) else "rw"
        return self._engine.command(name, argv, environ, access)
