"""Client of qwire: Qwen models behind gRPC.

    with Client("127.0.0.1:50051") as client:
        for delta in client.generate(chat="Hello!", max_tokens=64):
            print(delta.text, end="", flush=True)

Everything listed in `__all__` is public, and so are the messages and stubs in `qwire.v1`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwire.aio_client import AsyncClient, AsyncGeneration
    from qwire.client import Client, Generation
    from qwire.errors import FieldViolation, QwireError, Reason

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "Client",
    "FieldViolation",
    "Generation",
    "QwireError",
    "Reason",
    "__version__",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded when first used: the engine imports qwire.prefix, and must get neither grpc nor protobuf with it.
    homes = {
        "qwire.aio_client": ("AsyncClient", "AsyncGeneration"),
        "qwire.client": ("Client", "Generation"),
        "qwire.errors": ("FieldViolation", "QwireError", "Reason"),
    }
    for home, names in homes.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
