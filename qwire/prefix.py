"""Prefix hashing: the names of KV-cache blocks, the same in routers and workers.

A block is `block_size` consecutive token ids. Its hash covers everything before it too, so equal hashes mean equal
prefixes, under the same root:

    hash(i) = SHA-256(hash(i - 1) + ids of block i as little-endian u32)[:16],   hash(-1) = root

The root covers whatever else the cached keys and values depend on, and who may see them. It is the first 16 bytes of
the SHA-256 of these fields in order, each preceded by its length in bytes as a little-endian u32, so that no two
different lists of fields give the same bytes:

    "qwire.prefix.v1", model fingerprint, KV dtype (UTF-8), block size (little-endian u32), adapter (UTF-8), scope

Only full blocks have a hash.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence

HASH_BYTES = 16

_DOMAIN = b"qwire.prefix.v1"
_U32_MAX = 0xFFFF_FFFF


def root(model_fingerprint: bytes, kv_dtype: str, block_size: int, adapter: str, scope: bytes) -> bytes:
    """What the hashes of a sequence's blocks start from, 16 bytes.

    Args:
        model_fingerprint: identifies the weights.
        kv_dtype: how keys and values are stored, such as "float32".
        block_size: ids in a block, at least 1.
        adapter: name of the fine-tuned adapter, empty for none.
        scope: whose requests share blocks; requests of different scopes never hit each other's.

    Raises:
        ValueError: block_size is no positive u32.
    """
    if not 1 <= block_size <= _U32_MAX:
        raise ValueError(f"block_size must be in [1, {_U32_MAX}], not {block_size}")
    digest = hashlib.sha256()
    size = block_size.to_bytes(4, "little")
    for field in (_DOMAIN, model_fingerprint, kv_dtype.encode(), size, adapter.encode(), scope):
        digest.update(len(field).to_bytes(4, "little"))
        digest.update(field)
    return digest.digest()[:HASH_BYTES]


def block_hash(parent: bytes, ids: Iterable[int]) -> bytes:
    """Hash of the block that holds `ids` and follows `parent` (a block's hash, or the root), 16 bytes.

    Raises:
        ValueError: an id is no u32, or `parent` isn't 16 bytes long.
    """
    return hashlib.sha256(_parent(parent) + _little_endian(ids)).digest()[:HASH_BYTES]


def block_hashes(parent: bytes, ids: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of all full blocks of `ids` that follow `parent`, in order; what is left over has none.

    Takes about 0.3 ms for 4,000 ids in blocks of 16.

    Raises:
        ValueError: an id is no u32, `parent` isn't 16 bytes long, or block_size is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    width = 4 * block_size
    # Packed at once: packing block by block costs more than the hashing.
    data = _little_endian(ids[: len(ids) // block_size * block_size])
    sha256 = hashlib.sha256
    hashes = []
    last = _parent(parent)
    for start in range(0, len(data), width):
        last = sha256(last + data[start : start + width]).digest()[:HASH_BYTES]
        hashes.append(last)
    return hashes


def extend(hashes: list[bytes], root: bytes, ids: Sequence[int], block_size: int) -> None:
    """Appends the hashes of the full blocks of `ids` that `hashes` doesn't hold yet, for a sequence that grows.

    Args:
        hashes: those of the first blocks of `ids`, from earlier calls; changed in place.
        root: the sequence's root.
        ids: the whole sequence.
        block_size: ids in a block, at least 1.

    Raises:
        ValueError: as `block_hashes`.
    """
    hashes += block_hashes(hashes[-1] if hashes else root, ids[len(hashes) * block_size :], block_size)


def _little_endian(ids: Iterable[int]) -> bytes:
    try:
        packed = array("I", ids)
    except OverflowError as error:
        raise ValueError("token ids must fit an unsigned 32-bit number") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _parent(value: bytes) -> bytes:
    if len(value) != HASH_BYTES:
        raise ValueError(f"a parent hash has {HASH_BYTES} bytes, not {len(value)}")
    return value
