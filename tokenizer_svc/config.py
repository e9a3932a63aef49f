"""Settings of the tokenizer service."""

from __future__ import annotations

from pathlib import Path

import click

from qwire.service.config import ConfigError, setting, settings


@settings
class TokenizerConfig:
    """Turn text and chats into token ids, and ids back into text."""

    model: Path = setting(
        help="Folder with tokenizer.json and tokenizer_config.json.",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
    )
    served_model_name: str = setting(default="", help="The name that requests use; the folder's name if empty.")
    listen: str = setting(default="127.0.0.1:50071", help="Address for routers: host:port or unix:path.")
    insecure_bind: bool = setting(default=False, help="Allow an address that other machines can reach, without TLS.")
    threads: int = setting(default=2, help="Threads that encode and decode.")
    max_message_bytes: int = setting(default=64 * 1024 * 1024, help="Size of a request message.")
    max_texts: int = setting(default=256, help="Texts of an Encode, sequences of a Decode.")
    max_open_sequences: int = setting(default=8192, help="Sequences open on one Detokenize stream.")
    max_waiting_renders: int = setting(default=64, help="Chats that wait to be rendered; one more is refused.")
    render_seconds: float = setting(default=2.0, help="Time for rendering one chat.")
    render_mib: int = setting(default=512, help="Memory for rendering one chat, in MiB.")
    render_output_bytes: int = setting(default=4 * 1024 * 1024, help="Size of a rendered chat.")
    grace: float = setting(default=10.0, help="Seconds that running calls get when the service is told to stop.")

    def __post_init__(self) -> None:
        for name in (
            "threads",
            "max_message_bytes",
            "max_texts",
            "max_open_sequences",
            "render_seconds",
            "render_mib",
            "render_output_bytes",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')}: must be positive")
        for name in ("max_waiting_renders", "grace"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')}: must not be negative")

    @property
    def name(self) -> str:
        return self.served_model_name or self.model.resolve().name
