"""One stack a module: a tiny random model wherever text does not matter, the demo model where it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwire import Client
from tests.helpers.stacks import RunningStack, running_stack, write_tiny_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[RunningStack]:
    with running_stack(tiny_model, "tiny", worker_flags=("--kv-cache-mib", "64")) as stack:
        yield stack


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> Iterator[RunningStack]:
    with running_stack(demo_folder, "demo", worker_flags=("--dtype", "float32")) as stack:
        yield stack


@pytest.fixture
def client(tiny: RunningStack) -> Iterator[Client]:
    with tiny.client() as client:
        yield client
