"""Reading safetensors: headers are checked, and rows read where the header says that they lie.

Format: https://github.com/huggingface/safetensors#format (u64 header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor

from worker.model.errors import ModelError
from worker.model.files import weight_files

_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}
)
"""By safetensors' names: those that are read. Data are little-endian, as are the machines that this runs on."""
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what it is."""

    path: Path
    name: str
    dtype: str
    """safetensors' name: F32, BF16, …"""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""


def read_header(path: Path) -> dict[str, StoredTensor]:
    """A file's tensors. Raises ModelError, naming the tensor where one is at fault, for a damaged or truncated file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ModelError(f"{path}: not a safetensors file, or truncated within its header ({size} bytes)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path}: damaged header: {error}") from error
    tensors = {}
    for name, entry in header.items() if isinstance(header, dict) else ():
        if name == "__metadata__":
            continue
        tensors[name] = _stored(path, name, entry, 8 + length, size)
    return tensors


def _stored(path: Path, name: str, entry: Any, data_start: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        good = all(isinstance(size, int) and size >= 0 for size in (*shape, start, stop)) and start <= stop
        if good and dtype in DTYPES:
            good = stop - start == math.prod(shape) * DTYPES[dtype].itemsize
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ModelError(f"{path}: {name}: damaged header entry")
    missing = data_start + stop - size
    if missing > 0:
        raise ModelError(f"{path}: {name}: the file is truncated: it ends {missing} bytes before this tensor")
    return StoredTensor(path, name, dtype, shape, data_start + start)


class Checkpoint:
    """A folder's tensors, each read when asked for. A context manager: files stay open until it is left.

    Files are read, not mapped: pages of a mapped file count as the process's memory for as long as the kernel likes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        for path in weight_files(folder):
            for name, stored in read_header(path).items():
                if name in self.tensors:
                    raise ModelError(f"{path}: {name}: is also in {self.tensors[name].path.name}")
                self.tensors[name] = stored
        self._asked: dict[str, None] = {}
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def find(self, name: str, shape: tuple[int, ...], dtypes: Collection[str] = FLOATS) -> StoredTensor:
        """The tensor `name`. Raises ModelError if it is missing, of another shape, or of none of these dtypes."""
        stored = self.tensors.get(name)
        if stored is None:
            raise ModelError(f"{self.folder}: {name}: missing from the weights")
        self._asked[name] = None
        if stored.shape != shape:
            raise ModelError(f"{stored.path}: {name}: expected shape {list(shape)}, found {list(stored.shape)}")
        if stored.dtype not in dtypes:
            raise ModelError(f"{stored.path}: {name}: dtype {stored.dtype} is not one of {', '.join(dtypes)}")
        return stored

    def rows(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor, in memory of their own. Raises ModelError."""
        rest = stored.shape[1:]
        out = torch.empty(stop - start, *rest, dtype=DTYPES[stored.dtype])
        row_bytes = out.dtype.itemsize * math.prod(rest)
        left = out.view(-1).view(torch.uint8).numpy().data
        offset = stored.offset + start * row_bytes
        try:
            while left.nbytes:
                count = os.preadv(self._open(stored.path), [left], offset)
                if not count:
                    raise unreadable(stored)
                left, offset = left[count:], offset + count
        except OSError as error:
            raise unreadable(stored, error.strerror or str(error)) from error
        return out

    def place(self, stored: StoredTensor, row: int) -> tuple[int, int]:
        """The open file's descriptor and the offset where a row of a tensor begins. Raises ModelError."""
        row_bytes = DTYPES[stored.dtype].itemsize * math.prod(stored.shape[1:])
        try:
            return self._open(stored.path), stored.offset + row * row_bytes
        except OSError as error:
            raise unreadable(stored, error.strerror or str(error)) from error

    def unread(self) -> list[str]:
        """Names that nothing has asked for."""
        return [name for name in self.tensors if name not in self._asked]

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]


def unreadable(stored: StoredTensor, reason: str = "") -> ModelError:
    """What a tensor's reader raises: the system's `reason`, or none where the file ends before the tensor does."""
    told = f"cannot be read: {reason}" if reason else "the file is truncated"
    return ModelError(f"{stored.path}: {stored.name}: {told}")


def cast(rows: Tensor, dtype: torch.dtype, stored: StoredTensor) -> Tensor:
    """Rows of a stored tensor in `dtype`. Raises ModelError where float16 can't hold them."""
    if dtype == torch.float16 and rows.dtype != torch.float16 and bool((rows.abs() > 65504.0).any()):
        raise ModelError(f"{stored.path}: {stored.name}: holds values beyond the range of float16")
    return rows.to(dtype)
