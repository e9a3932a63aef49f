"""Prints docs/settings.md: every setting of every service, from the dataclasses that hold them."""

from __future__ import annotations

import dataclasses
from typing import Any

from router.config import RouterConfig
from tokenizer_svc.config import TokenizerConfig
from worker.config import WorkerConfig
from worker.fake.config import FakeWorkerConfig

SERVICES: dict[str, tuple[str, type[Any]]] = {
    "router": ("python -m router serve", RouterConfig),
    "tokenizer": ("python -m tokenizer_svc serve", TokenizerConfig),
    "worker": ("python -m worker serve", WorkerConfig),
    "fake_worker": ("python -m worker.fake serve", FakeWorkerConfig),
}

HEAD = """# Settings

Made by `make docs`; a test fails where it is stale. A flag `--max-streams` of the router is also
`QWIRE_ROUTER_MAX_STREAMS` in the environment, and `max_streams` in the TOML file that `--config FILE` names. Flags win
over the environment, the environment over the file.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for service, (command, config) in SERVICES.items():
        parts.append(f"\n## `{command}`\n\n| flag | default | |\n|---|---|---|\n")
        for field in dataclasses.fields(config):
            flag = "--" + field.name.replace("_", "-")
            parts.append(f"| `{flag}` | {_default(field)} | {field.metadata['help']} |\n")
        parts.append(f"\nEnvironment: `QWIRE_{service.upper()}_…`\n")
    return "".join(parts)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default == "":
        return "empty"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return f"{field.default:,}" if isinstance(field.default, int) else f"`{field.default}`"


if __name__ == "__main__":
    print(page(), end="")
