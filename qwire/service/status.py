"""Errors that more than one service gives."""

from __future__ import annotations

import grpc

from qwire.errors import QwireError, Reason


def not_in_this_release(what: str) -> QwireError:
    """For a method that the contract names and this release doesn't have."""
    return QwireError(
        grpc.StatusCode.UNIMPLEMENTED, f"{what} is not in this release", reason=Reason.NOT_IN_THIS_RELEASE
    )
