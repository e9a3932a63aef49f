"""Stand-ins for flash-attn: packages of its modules' names, whose functions have its signatures and plain arithmetic.

They refuse what the compiled ones refuse (flash_api.cpp of flash-attn 2.8.3, interface.py of flash-attn-4).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDERS = {"flash_attn": "fa2", "flash_attn_interface": "fa3", "flash_attn.cute": "fa4"}
"""By module, the folder to put on the path for it."""


def path_of(module: str) -> Path:
    return Path(__file__).parent / FOLDERS[module]


@contextmanager
def installed(module: str) -> Iterator[None]:
    """As if the package that holds `module` were installed, and no other of them."""
    _forget()
    sys.path.insert(0, str(path_of(module)))
    try:
        yield
    finally:
        sys.path.remove(str(path_of(module)))
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
        del sys.modules[name]
