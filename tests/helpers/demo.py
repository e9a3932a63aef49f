"""The demo model as users get it: through `qwire.hub`, from the same cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwire import hub


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model's folder; fetched and converted if this is the first time."""
    return hub.resolve(hub.DEMO, sys.stderr)


@pytest.fixture(scope="session")
def demo_gguf(demo_folder: Path) -> Path:
    """The file that it was converted from."""
    (path,) = demo_folder.parent.glob("*.gguf")
    return path
