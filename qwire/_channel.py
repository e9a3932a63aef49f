"""How both clients open a channel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources

from qwire import __version__

MAX_ADDRESSES = 64
DEFAULT_ADDRESS = "127.0.0.1:50051"

RETRY_BUFFER_BYTES = 8 * 1024 * 1024
"""Of a request, for gRPC to be able to send it again: larger ones are not retried. Routers take 4 MiB by default."""

_MAX_RECEIVE_BYTES = 16 * 1024 * 1024
_LOCAL_PREFIXES = ("unix:", "unix-abstract:", "127.", "localhost:", "[::1]:")


def service_config(*, retries: bool = True) -> str:
    """The published service config as JSON: what may be sent again, and that calls take turns over addresses.

    Args:
        retries: whether gRPC is to send calls again by itself. Where it isn't, addresses whose health isn't SERVING are
            left out: with both, calls of grpcio 1.85 hung that were being tried again when the only address turned
            NOT_SERVING.
    """
    text = resources.files("qwire").joinpath("service_config.json").read_text(encoding="utf-8")
    if retries:
        return text
    config = json.loads(text)
    for method in config["methodConfig"]:
        del method["retryPolicy"]
    config["healthCheckConfig"] = {"serviceName": "qwire.v1.GenerationService"}
    return json.dumps(config)


def channel_options(address: str) -> list[tuple[str, int | str]]:
    """The gRPC channel arguments for `address`, whatever service is there."""
    options: list[tuple[str, int | str]] = [
        ("grpc.primary_user_agent", f"qwire/{__version__}"),
        ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
        # A stream may be silent for long while its request waits in a queue, so a peer that is gone is found by pings.
        # How soon is up to grpc.http2.ping_timeout_ms (a minute by default); grpc.keepalive_timeout_ms has no say where
        # it is the longer one.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        # A router that was started again is found soon, and one that takes connections and says nothing isn't waited
        # for: the "minimum" is how long connecting may take.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if address.startswith(_LOCAL_PREFIXES):
        # gRPC obeys http_proxy even for the loopback interface, where a proxy can only be in the way.
        options.append(("grpc.enable_http_proxy", 0))
    return options


def router_options(
    address: str, extra: Sequence[tuple[str, int | str]] = (), *, retries: bool = True
) -> list[tuple[str, int | str]]:
    """The same for a router, with the published service config; those in `extra` win.

    Args:
        retries: gRPC sends calls again by itself; not where there is another router to go to at once.
    """
    options = [
        *channel_options(address),
        ("grpc.service_config", service_config(retries=retries)),
        ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
    ]
    return list((dict(options) | dict(extra)).items())  # of two with one name gRPC takes the first


def address_list(address: str | Sequence[str]) -> list[str]:
    """One address or several as a list. Raises ValueError for none and for too many."""
    addresses = [address] if isinstance(address, str) else list(address)
    if not 1 <= len(addresses) <= MAX_ADDRESSES:
        raise ValueError(f"1 to {MAX_ADDRESSES} addresses are needed, not {len(addresses)}")
    return addresses
