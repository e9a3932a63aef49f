"""Which files of a model folder hold its weights."""

from __future__ import annotations

import json
from pathlib import Path

from worker.model.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


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
