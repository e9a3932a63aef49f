"""Settings of the router."""

from __future__ import annotations

import click

from qwire.service.config import ConfigError, setting, settings
from router.admission import Limits
from router.placement import POLICIES


@settings
class RouterConfig:
    """Serve clients: take generate streams, tokenize, dispatch to workers, stream tokens and text back."""

    listen: str = setting(
        default="127.0.0.1:50051", help="Public address: host:port (port 0 takes a free one) or unix:path."
    )
    admin_listen: str = setting(default="", help="Address of AdminService; empty serves none.")
    insecure_bind: bool = setting(default=False, help="Allow an address that other machines can reach, without TLS.")
    worker: tuple[str, ...] = setting(help="A worker's gRPC target; repeatable.", multiple=True)
    tokenizer: str = setting(help="The tokenizer service's gRPC target; calls take turns over all its addresses.")
    fleet_secret: str = setting(
        default="", help="Shared by routers and workers of a fleet; keys cache scopes and resume tokens.", secret=True
    )
    drain_delay: float = setting(
        default=2.0,
        help="Seconds between NOT_SERVING and the end of new calls when the router is told to stop: for clients and"
        " balancers to go elsewhere.",
    )
    grace: float = setting(default=30.0, help="Seconds that running streams get after that.")
    worker_wait: float = setting(default=10.0, help="Seconds that a call waits for a worker when none is ready.")
    max_moves: int = setting(default=5, help="Workers that a stream may lose before it ends UNAVAILABLE.")
    placement: str = setting(
        default="prefix",
        help="Which worker takes a request: prefix (the least wait, its cached prompt counted), least-loaded or"
        " round-robin.",
        type=click.Choice(sorted(POLICIES)),
    )
    max_streams: int = setting(default=1024, help="Streams served at once; one more is refused RESOURCE_EXHAUSTED.")
    max_queued: int = setting(
        default=512, help="Requests that wait for room at a worker; one more is refused RESOURCE_EXHAUSTED."
    )
    max_queued_tokens: int = setting(
        default=1024 * 1024, help="Prompt tokens of those, before tokenizing guessed from their bytes."
    )
    max_running: int = setting(default=1024, help="Requests at workers; more wait.")
    max_running_tokens: int = setting(default=16 * 1024 * 1024, help="Prompt tokens of those.")
    tenant_max_queued: int = setting(default=0, help="As max_queued, of one tenant; 0: no less than of all.")
    tenant_max_queued_tokens: int = setting(
        default=0, help="As max_queued_tokens, of one tenant; 0: no less than of all."
    )
    tenant_max_running: int = setting(default=0, help="As max_running, of one tenant; 0: no less than of all.")
    tenant_max_running_tokens: int = setting(
        default=0, help="As max_running_tokens, of one tenant; 0: no less than of all."
    )
    max_request_bytes: int = setting(default=4 * 1024 * 1024, help="Size of a request message.")
    max_pending_tokens: int = setting(
        default=4096, help="Tokens held for a client that doesn't read before its stream ends."
    )
    write_timeout: float = setting(
        default=10.0, help="Seconds that one write to a client may be stuck before its stream ends."
    )
    default_max_tokens: int = setting(default=4096, help="max_tokens where unset and the context has room.")
    max_messages: int = setting(default=1024, help="Messages of a chat.")
    max_tools: int = setting(default=128, help="Tools of a chat.")
    max_stop_strings: int = setting(default=16, help="Stop strings of a request.")
    max_stop_string_bytes: int = setting(default=256, help="UTF-8 bytes of one stop string.")
    max_stop_token_ids: int = setting(default=64, help="Stop token ids of a request.")
    max_choices: int = setting(default=16, help="Choices of a request.")
    max_logprobs: int = setting(default=20, help="Alternatives of logprobs, and of prompt_logprobs.")
    max_prompt_logprobs: int = setting(
        default=65_536, help="Log-probabilities of a request's prompt, alternatives counted."
    )
    max_logit_bias: int = setting(default=1024, help="Entries of logit_bias, and of allowed_token_ids.")
    max_bad_words: int = setting(default=64, help="Bad words of a request.")

    max_constraint_bytes: int = setting(default=128 * 1024, help="UTF-8 bytes of a constraint's text.")
    max_constraint_texts: int = setting(default=1024, help="Texts of a choice constraint.")

    def __post_init__(self) -> None:
        if not self.worker:
            raise ConfigError("--worker: at least one target is needed")
        if len(set(self.worker)) != len(self.worker):
            raise ConfigError("--worker: a target is named twice")
        for name in (
            "grace",
            "drain_delay",
            "worker_wait",
            "max_moves",
            "tenant_max_queued",
            "tenant_max_queued_tokens",
            "tenant_max_running",
            "tenant_max_running_tokens",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')}: must not be negative")
        for name in (
            "max_streams",
            "max_queued",
            "max_queued_tokens",
            "max_running",
            "max_running_tokens",
            "max_request_bytes",
            "max_pending_tokens",
            "write_timeout",
            "default_max_tokens",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')}: must be positive")

    @property
    def limits(self) -> Limits:
        """Of all requests together."""
        return Limits(self.max_queued, self.max_queued_tokens, self.max_running, self.max_running_tokens)

    @property
    def tenant_limits(self) -> Limits:
        """Of each tenant's."""
        return Limits(
            self.tenant_max_queued or self.max_queued,
            self.tenant_max_queued_tokens or self.max_queued_tokens,
            self.tenant_max_running or self.max_running,
            self.tenant_max_running_tokens or self.max_running_tokens,
        )
