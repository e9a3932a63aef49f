"""Settings of a fake worker."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from qwire.service.config import ConfigError, setting, settings


@settings
class FakeWorkerConfig:
    """Run a worker without a model: real gRPC face, engine and scheduler, ids from a hash, time from a cost model."""

    model: str = setting(
        default="", help="Folder of a model whose vocabulary, context, EOS and tokenizer are claimed; none if empty."
    )
    served_model_name: str = setting(default="", help="The name that requests use; the folder's name, or fake.")
    listen: str = setting(default="127.0.0.1:50061", help="Address for routers: host:port or unix:path.")
    insecure_bind: bool = setting(default=False, help="Allow an address that other machines can reach, without TLS.")
    worker_id: str = setting(default="", help="Names the worker in placements and logs; host and process id if empty.")
    step_ms: float = setting(default=10.0, help="Milliseconds that every step takes.")
    token_us: float = setting(default=20.0, help="Microseconds that each token of a step adds, prompt or generated.")
    vocab_size: int = setting(default=32_000, help="Ids, where no model is named.")
    context_length: int = setting(default=32_768, help="Prompt and output of a request, where no model is named.")
    kv_blocks: int = setting(default=65_536, help="Number of KV blocks; one takes 8 bytes a position.")
    block_size: int = setting(default=16, help="Positions in a KV block.")
    max_step_tokens: int = setting(default=2_048, help="Tokens that one step computes.")
    max_running: int = setting(default=256, help="Sequences that run at once.")
    max_waiting: int = setting(default=256, help="Requests beyond max_running that wait; one more is refused.")
    grace: float = setting(default=30.0, help="Seconds that running requests get when the worker is told to stop.")

    def __post_init__(self) -> None:
        for name in ("kv_blocks", "block_size", "max_step_tokens", "max_running", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1")
        for name in ("step_ms", "token_us", "grace"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')}: must not be negative")

    @property
    def name(self) -> str:
        return self.served_model_name or (Path(self.model).resolve().name if self.model else "fake")

    @property
    def id(self) -> str:
        return self.worker_id or f"{socket.gethostname()}-{os.getpid()}"

    def file(self, name: str) -> dict[str, Any]:
        """A JSON file of the model's folder; empty where there is none. Raises ConfigError."""
        path = Path(self.model) / name
        if not self.model or not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--model: {path} can't be read: {error}") from error
        return found if isinstance(found, dict) else {}
