"""What `import qwire` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qwire

ROOT = Path(__file__).parents[2]


def test_exported_names() -> None:
    assert qwire.__all__ == [
        "AsyncClient", "AsyncGeneration", "Client", "FieldViolation", "Generation", "QwireError", "Reason",
        "__version__",
    ]  # fmt: skip
    for name in qwire.__all__:
        assert getattr(qwire, name) is not None
        assert name in dir(qwire)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = qwire.nonsense


def test_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert qwire.__version__ == project["version"]


@pytest.mark.parametrize(
    ("imports", "absent"),
    [
        ("qwire.prefix", ["grpc", "google.protobuf", "qwire.v1", "torch", "tokenizers", "numpy"]),
        ("qwire.client, qwire.aio_client", ["torch", "tokenizers", "numpy", "qwire.service", "click"]),
        ("qwire.cli", ["torch", "tokenizers", "numpy", "huggingface_hub", "router", "worker", "tokenizer_svc"]),
    ],
)
def test_imports_are_light(imports: str, absent: list[str]) -> None:
    code = f"import sys, {imports}; print([name for name in {absent} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
