"""Weights that a backend reads from files by itself: the bytes are those that it would pack if it was handed them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import write_random_qwen3
from tests.helpers.native_modules import module
from worker.kernels import Kernels, StoredError
from worker.kernels.cpu import CpuKernels
from worker.model import ModelConfig, ModelError, Shard, load_model
from worker.model.layers import Matrix
from worker.quantize import quantize_folder


class Handed:
    """A backend that can't read."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        if name == "pack_stored":
            raise AttributeError(name)
        return getattr(self._kernels, name)


class Reading(CpuKernels):
    """Counts the weights that it reads, and notes which rows of each."""

    read = 0

    def pack_stored(self, parts: Any) -> None:
        self.read += len({id(part.prepared) for part in parts})
        self.rows = {(id(part.prepared), part.first_row, part.rows) for part in parts}
        super().pack_stored(parts)


@pytest.fixture
def kernels() -> Reading:
    return Reading("portable", module("portable", 2))


def packed(folder: Path, kernels: Any, shard: Shard, **options: Any) -> dict[str, torch.Tensor]:
    config = ModelConfig.read(folder)
    model = load_model(folder, config, kernels, getattr(torch, config.dtype), shard, **options)
    return {name: layer.prepared.data for name, layer in model.named_modules() if isinstance(layer, Matrix)}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_what_is_read_is_what_would_be_handed_over(tmp_path: Path, kernels: Reading, kind: str, world: int) -> None:
    quantized = kind in ("int8", "int4")
    shape = {"heads": 4, "kv_heads": 2, "intermediate": 256, "vocab": 333, "tie": False}
    folder = write_random_qwen3(tmp_path / "in", dtype="bfloat16" if quantized else kind, shards=2, **shape)  # type: ignore[arg-type]
    if quantized:
        quantize_folder(folder, tmp_path / "out", kind)  # type: ignore[arg-type]
        folder = tmp_path / "out"
    for rank in range(world):
        shard = Shard(rank, world)
        wanted = packed(folder, Handed(kernels), shard)
        assert not kernels.read
        got = packed(folder, kernels, shard)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        # Handed over are cut columns, of o_proj and down_proj in each of two layers, and what the last rank pads: the
        # tables of a vocabulary.
        assert kernels.read == len(wanted) - (4 if world > 1 else 0) - (2 if rank else 0)
        kernels.read = 0


def test_rows_that_share_a_panel_with_others_are_handed_over(tmp_path: Path, kernels: Reading) -> None:
    folder = write_random_qwen3(tmp_path, head_dim=16, heads=2, kv_heads=1)
    wanted = packed(folder, Handed(kernels), Shard())
    config = ModelConfig.read(folder)
    model = load_model(folder, config, kernels, getattr(torch, config.dtype), Shard())
    got = {name: layer for name, layer in model.named_modules() if isinstance(layer, Matrix)}
    assert all(torch.equal(got[name].prepared.data, wanted[name]) for name in wanted)
    qkv = [layer.prepared for layer in got.values() if len(layer.parts) == 3]
    assert len(qkv) == 2
    # 32 rows of q, and 16 of k and v each, which are joined.
    read = [(first, rows) for weight, first, rows in kernels.rows if weight in map(id, qkv)]
    assert read == [(0, 32)] * 2


def test_weights_that_are_converted_are_handed_over(tmp_path: Path, kernels: Reading) -> None:
    folder, told = write_random_qwen3(tmp_path), []
    packed(folder, kernels, Shard(), quantize="int8", on_reading=lambda: told.append(1))
    assert not kernels.read
    assert not told
    packed(folder, kernels, Shard(), on_reading=lambda: told.append(kernels.read))
    assert told == [0], "before it reads"


def test_a_weight_that_cannot_be_read_is_named(tmp_path: Path, kernels: Reading) -> None:
    folder = write_random_qwen3(tmp_path)
    file = folder / "model.safetensors"

    def cut() -> None:
        file.write_bytes(file.read_bytes()[:-1000])

    # The one that lies last, by the names' order.
    with pytest.raises(ModelError, match=r"model\.safetensors: model\.\S+\.weight: the file is truncated"):
        packed(folder, kernels, Shard(), on_reading=cut)

    def fail(parts: Any) -> None:
        raise StoredError(1, 0, "Input/output error")

    kernels.pack_stored = fail  # type: ignore[method-assign]
    folder = write_random_qwen3(tmp_path / "again")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.\S+: cannot be read: Input/output error"):
        packed(folder, kernels, Shard())
