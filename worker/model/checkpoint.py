"""Reading safetensors: headers checked by us, tensors cut out of the mapped file by the safetensors library.

Format: https://github.com/huggingface/safetensors#format (u64 header length, JSON header, data).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.model.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_FLOATS: Final[Mapping[str, int]] = MappingProxyType({"F32": 4, "F16": 2, "BF16": 2})


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what it is."""

    path: Path
    dtype: str
    """safetensors' name: F32, BF16, …"""
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The folder's weight files, by name: the index's shards, or the single file. ModelError if one is missing."""
    index = folder / INDEX_NAME
    if index.exists():
        files = sorted({folder / name for name in _read_index(index).values()})
    else:
        files = [folder / SINGLE_NAME]
    for path in files:
        if not path.is_file():
            told = f", which {INDEX_NAME} names," if index.exists() else f" (and no {INDEX_NAME})"
            raise ModelError(f"{path}: missing weight file{told}")
    return files


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is not an index of safetensors shards: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: weight_map: expected an object that names a file for each tensor")
    for name, file in weight_map.items():
        # A shard is a plain file name: an index must not reach outside its folder.
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{path}: weight_map: {name}: expected a file name, got {file!r}")
    return weight_map


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
        tensors[name] = _stored(path, name, entry, size - 8 - length)
    return tensors


def _stored(path: Path, name: str, entry: Any, data_size: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        good = all(isinstance(size, int) and size >= 0 for size in (*shape, start, stop)) and start <= stop
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ModelError(f"{path}: {name}: damaged header entry")
    if stop > data_size:
        raise ModelError(f"{path}: {name}: the file is truncated: it ends {stop - data_size} bytes before this tensor")
    return StoredTensor(path, dtype, shape)


class Checkpoint:
    """A folder's tensors, each read when asked for. A context manager: files stay mapped until it is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        for path in weight_files(folder):
            for name, stored in read_header(path).items():
                if name in self.tensors:
                    raise ModelError(f"{path}: {name}: is also in {self.tensors[name].path.name}")
                self.tensors[name] = stored
        self._read: dict[str, None] = {}
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()

    def read_into(self, target: Tensor, name: str, shape: tuple[int, ...], bounds: tuple[slice, ...]) -> None:
        """Copies `bounds` of the tensor `name`, whose whole shape must be `shape`, into `target`, casting.

        Raises ModelError if it is missing, of another shape, or not of a floating-point dtype.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise ModelError(f"{self.folder}: {name}: missing from the weights")
        self._read[name] = None
        if stored.shape != shape:
            raise ModelError(f"{stored.path}: {name}: expected shape {list(shape)}, found {list(stored.shape)}")
        if stored.dtype not in _FLOATS:
            raise ModelError(f"{stored.path}: {name}: dtype {stored.dtype} is not one of {', '.join(_FLOATS)}")
        try:
            part: Tensor = self._open(stored.path).get_slice(name)[bounds]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"{stored.path}: {name}: cannot be read: {error}") from error
        if target.dtype == torch.float16 and part.dtype != torch.float16 and bool((part.abs() > 65504.0).any()):
            raise ModelError(f"{stored.path}: {name}: holds values beyond the range of float16")
        target.copy_(part)

    def unread(self) -> list[str]:
        """Names that nothing has asked for."""
        return [name for name in self.tensors if name not in self._read]

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error
        return self._files[path]
