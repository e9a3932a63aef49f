"""`python -m qwire.service.healthcheck ADDRESS [--service NAME]`: exit status 0 if it says SERVING, 1 if not.

For containers and process managers that ask by running a command. It takes a fifth of a second of one core, most of it
Python and grpc being imported, so it imports nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_SECONDS = 5.0
_OPTIONS = (
    # A proxy could only be in the way of a check of this machine's own services.
    ("grpc.enable_http_proxy", 0),
)


def status(address: str, service: str, timeout: float = TIMEOUT_SECONDS) -> str:
    """What the server at a gRPC target says of a service, or the name of the code with which the call failed.

    An empty `service` asks about the server as a whole.
    """
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout
            )
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m qwire.service.healthcheck", description="Asks grpc.health.v1.")
    parser.add_argument("address", metavar="ADDRESS", help="gRPC target: host:port or unix:path")
    parser.add_argument("--service", default="", metavar="NAME", help="full name of a service; all if not given")
    options = parser.parse_args(arguments)
    said = status(options.address, options.service)
    print(said)  # noqa: T201 - process managers keep it with the result
    return 0 if said == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
