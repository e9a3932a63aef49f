"""What commands print."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import status_pb2

from qwire.errors import QwireError

EXIT_INTERRUPTED = 128 + signal.SIGINT


def message_json(message: Message) -> str:
    """A message as one line of JSON: names in lowerCamelCase, defaults included."""
    return json_format.MessageToJson(
        message, indent=None, always_print_fields_with_no_presence=True, ensure_ascii=False
    )


def error_json(error: QwireError) -> str:
    """An error as one line of JSON: code by name, message, and the google.rpc details."""
    details = status_pb2.Status.FromString(error.status_bytes()).details
    value: dict[str, Any] = {
        "code": error.code.name,
        "message": error.message,
        "details": [json_format.MessageToDict(detail) for detail in details],
    }
    return json.dumps(value, ensure_ascii=False)


def error_text(error: QwireError) -> str:
    """An error for people, with every violation on a line of its own."""
    lines = [f"Error: {error.message or error.code.name} ({error.reason or error.code.name})"]
    lines += [f"  {violation.field}: {violation.description}" for violation in error.violations]
    if error.retry_after is not None:
        lines.append(f"  Try again in {error.retry_after:g} s.")
    return "\n".join(lines)


@contextmanager
def reported_errors(*, as_json: bool = False) -> Iterator[None]:
    """Ends the command with 1 on a failed call, printed to standard error, and with 130 on Ctrl-C."""
    try:
        yield
    except QwireError as error:
        click.echo(error_json(error) if as_json else error_text(error), err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def write(text: str) -> None:
    """Prints text as it is, and at once."""
    click.echo(text, nl=False)
    sys.stdout.flush()
