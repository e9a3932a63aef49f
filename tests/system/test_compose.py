"""compose.yaml and the image's recipe: what they promise, and that what they name runs. No engine is needed."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from router.config import RouterConfig
from tests.helpers.containers import ROOT, UID, Isolated, Plain, Project, read_compose
from tests.helpers.stacks import write_tiny_model
from tokenizer_svc.config import TokenizerConfig
from worker.config import WorkerConfig

COMPOSE = read_compose({})
SERVICES: dict[str, Any] = COMPOSE["services"]
SERVING: dict[str, Any] = {
    "tokenizer": TokenizerConfig,
    "worker-cpu": WorkerConfig,
    "worker-gpu": WorkerConfig,
    "router": RouterConfig,
}
NAMES = ("router", "tokenizer", "worker")
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


def namespaces_allowed() -> bool:
    return (
        subprocess.run(["unshare", "--map-root-user", "--net", "--mount", "true"], capture_output=True).returncode == 0
    )


@contextmanager
def running(project: Project) -> Iterator[None]:
    try:
        project.up()
        yield
        assert set(project.down().values()) == {0}
    finally:
        for process in project.processes.values():
            process.kill()
            process.wait()
        print(project.logs())  # shown for tests that fail


# What hides in a mount namespace is worth most, but not every system lets its users have one.
@pytest.mark.slow
@pytest.mark.parametrize("isolated", [True, False] if namespaces_allowed() else [False])
def test_it_runs(tmp_path: Path, isolated: bool, demo_folder: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "cache" / "demo").mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    engine: Isolated | Plain
    if isolated:
        # Nothing is set: it serves the demo model, which a cache in the volume holds.
        engine, model = Isolated(tmp_path, volume, NAMES, demo_folder.parents[1]), "demo"
        compose = read_compose({})
        # As Docker does it with proxies that its user has set.
        compose["services"]["router"]["environment"]["http_proxy"] = "http://127.0.0.1:9"
        link = Path("cache", "demo", *demo_folder.relative_to(demo_folder.parents[1]).parts)
    else:
        engine, model, link = Plain(volume, NAMES), f"{volume}/tiny", Path("tiny")
        compose = read_compose({"QWIRE_MODEL": "/models/tiny"})
        write_tiny_model(volume / "tiny")
    project = Project(compose, "cpu", engine, tmp_path / "logs")
    address = ["--address", engine.address]
    with closing(engine), running(project):
        assert (volume / "current").readlink() == link
        models = project.run("host", ["qwire", "models", *address])
        assert models.stdout.startswith(f"{model}: "), models.stderr
        question = ["--chat", "What is the capital of France?", "--temperature", "0", "--max-tokens", "16"]
        answer = project.run("host", ["qwire", "generate", *address, *question])
        assert answer.returncode == 0, answer.stderr
        assert not isolated or "Paris" in answer.stdout
        inode = (volume / "current").lstat().st_ino
        assert project.start_again("fetch") == 0
        assert (volume / "current").lstat().st_ino == inode
        if isolated:
            assert_contained(project)


def assert_contained(project: Project) -> None:
    """That the services did run as containers do: not as root, with nothing to write to but /tmp."""
    script = "id -u; grep CapEff /proc/self/status; for f in / /etc /models /tmp; do touch $f/x && echo $f; done"
    result = project.run("worker-cpu", ["sh", "-c", script])
    assert result.stdout.split() == [UID, "CapEff:", "0" * 16, "/tmp"]
    assert result.stderr.count("Read-only file system") == 3


def test_only_the_router_can_be_reached() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["router"]
    assert SERVICES["router"]["ports"] == ["127.0.0.1:50051:50051"]
    assert not any("network_mode" in service or "expose" in service for service in SERVICES.values())
    assert COMPOSE["networks"] == {"inside": {"internal": True}, "published": None, "fetching": None}
    networks = {name: set(service["networks"]) for name, service in SERVICES.items()}
    assert networks == {
        "fetch": {"fetching"},
        "tokenizer": {"inside"},
        "worker-cpu": {"inside"},
        "worker-gpu": {"inside"},
        "router": {"inside", "published"},
    }


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "user", "devices", "pid", "ipc"} & set(service)
    expected = {"fetch": ["models:/models"], "router": []}.get(name, ["models:/models:ro"])
    assert service.get("volumes", []) == expected


@pytest.mark.parametrize("name", SERVING)
def test_a_service_has_time_to_stop(name: str) -> None:
    grace: Any = next(field.default for field in dataclasses.fields(SERVING[name]) if field.name == "grace")
    assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) >= grace + 5
    assert SERVICES[name]["restart"] == "unless-stopped"
    assert SERVICES[name]["init"] is True


def test_the_gpu_worker_is_the_same_but_for_its_device() -> None:
    differing = ("profiles", "image", "build", "deploy")
    cpu, gpu = ({k: v for k, v in SERVICES[f"worker-{kind}"].items() if k not in differing} for kind in ("cpu", "gpu"))
    assert gpu.pop("command") == [*cpu.pop("command"), "--backend", "cuda"]
    assert cpu == gpu
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_the_image() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    # The virtual environment of one stage must find its Python in the other.
    assert len(bases) == 2 and bases[0] == bases[1]
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)", last, re.MULTILINE) == [f"{UID}:{UID}"]
    assert f"--uid {UID}" in last
    assert "apt-get" not in last
    torch = re.search(r"torch==\S+", DOCKERFILE)
    assert torch is not None and torch[0] in (ROOT / "scripts" / "setup.sh").read_text()


def test_what_the_image_copies_is_there() -> None:
    allowed = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    copied = [source for sources in copies for source in sources.split()]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / source).exists() for source in copied)
