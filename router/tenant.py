"""Whose request it is: by the call's metadata, for there is no authentication yet.

Workers never see a tenant's name, only keys that routers derive from it under the fleet's secret: one to share time by
(`tenant_key`), one to share cached prefixes by (`cache_scope`), which no two tenants have in common.
"""

from __future__ import annotations

import hashlib
import hmac
import string
from functools import lru_cache

from qwire.service.accepts import Metadata
from router.validation import Violations

TENANT_KEY = "qwire-tenant"
MAX_TENANT = 64
KEY_BYTES = 16
_CHARACTERS = frozenset(string.ascii_letters + string.digits + "._-")


def tenant_of(metadata: Metadata) -> str:
    """The tenant that a call's metadata names; empty if none. Raises QwireError INVALID_ARGUMENT for no tenant's name,
    or two."""
    names = [value for key, value in metadata or () if key == TENANT_KEY]
    if not names:
        return ""
    name = names[0]
    if len(names) > 1 or not isinstance(name, str) or not 1 <= len(name) <= MAX_TENANT or set(name) - _CHARACTERS:
        found = Violations()
        found.add(TENANT_KEY, f'must be given once, as 1 to {MAX_TENANT} letters, digits, ".", "_" and "-"')
        found.raise_if_any()
    return str(name)


def tenant_key(secret: str, tenant: str) -> bytes:
    """What workers know a tenant by."""
    return _keyed(secret, b"qwire tenant\0" + tenant.encode())


def cache_scope(secret: str, tenant: str, scope: str) -> bytes:
    """Whose cached blocks a request may share: those of its tenant's requests with the same scope."""
    return _keyed(secret, tenant.encode() + b"\0" + scope.encode())


@lru_cache(maxsize=1024)
def _keyed(secret: str, message: bytes) -> bytes:
    return hmac.digest(secret.encode(), message, hashlib.sha256)[:KEY_BYTES]
