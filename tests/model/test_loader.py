"""Loading: every way in which a folder can be wrong is told by file and tensor; sharding cuts what its plan says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.models import write_random_qwen2, write_random_qwen3
from worker.kernels import ReferenceKernels, WeightSpec
from worker.kernels.interface import PACK_ROWS
from worker.model import ModelConfig, ModelError, Shard, load_model, weights_digest, weights_state
from worker.model.layers import Matrix

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32, shard: Shard | None = None) -> Any:
    return load_model(folder, ModelConfig.read(folder), ReferenceKernels(), dtype, shard)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_qwen3(tmp_path / "model", tie=False)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(Q_PROJ), [Q_PROJ, "missing"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1].clone()}), [Q_PROJ, "[128, 128]", "[127, 128]", "safetensors"]),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)}), [Q_PROJ, "I8", "safetensors"]),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].double()}), [Q_PROJ, "F64"]),
        (
            lambda t: t.update({"model.layers.2.mlp.extra.weight": torch.zeros(1)}),
            ["layers.2.mlp.extra", "not part of"],
        ),
    ],
)
def test_wrong_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        load(change(folder, edit))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1, -200_000])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors.*truncated") as caught:
        load(folder)
    if keep < 0:
        assert "weight" in str(caught.value)


@pytest.mark.parametrize("content", [b"\x08\0\0\0\0\0\0\0notjson!", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_not_safetensors(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model"):
        load(folder)


@pytest.mark.parametrize("entry", [{}, {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, 3])
def test_damaged_header_entry(folder: Path, entry: Any) -> None:
    header = json.dumps({"x": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match=r"x: damaged"):
        load(folder)


def test_missing_files(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path / "model", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors: missing"):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: missing"):
        load(folder)
    with pytest.raises(ModelError, match=r"model\.safetensors: missing"):
        weights_digest(folder)


@pytest.mark.parametrize(
    "index", ["{", "{}", '{"weight_map": {"a": "../secret.safetensors"}}', '{"weight_map": {"a": 3}}']
)
def test_bad_index(tmp_path: Path, index: str) -> None:
    folder = write_random_qwen3(tmp_path / "model", shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json"):
        load(folder)


def test_what_old_checkpoints_carry_is_ignored(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path / "model", tie=True)
    extra = {"lm_head.weight": torch.zeros(512, 128), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32)}
    load(change(folder, lambda tensors: tensors.update(extra)))


def test_float16_overflow_is_told(folder: Path) -> None:
    change(folder, lambda tensors: tensors[Q_PROJ].fill_(1e6))
    with pytest.raises(ModelError, match=r"q_proj.*float16"):
        load(folder, torch.float16)


def test_digest_follows_the_bytes(tmp_path: Path) -> None:
    one = write_random_qwen3(tmp_path / "one", seed=1)
    assert weights_digest(one) == weights_digest(write_random_qwen3(tmp_path / "two", seed=1))
    assert weights_digest(one) != weights_digest(write_random_qwen3(tmp_path / "three", seed=2))
    four = write_random_qwen3(tmp_path / "four", shards=2)
    assert len(weights_digest(four)) == 64
    state = weights_state(four)
    assert weights_state(four) == state != weights_state(one)
    shard = next(four.glob("*-00002-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    assert weights_state(four) != state, "written again: to be read again"


class Recorder(ReferenceKernels):
    """Keeps weights as they come."""

    def packer(self, spec: WeightSpec) -> Any:
        return Kept(spec)


class Kept:
    def __init__(self, spec: WeightSpec) -> None:
        self.spec = spec
        self.pieces: list[Tensor] = []
        self.next = 0

    def put(self, row: int, rows: Tensor) -> None:
        assert row == self.next and row % PACK_ROWS == 0
        self.pieces.append(rows.clone())
        self.next += len(rows)

    def finish(self, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = torch.cat(self.pieces)
        assert weight.shape == (self.spec.out_features, self.spec.in_features)
        return weight, bias


@pytest.mark.parametrize("world", [2, 4])
def test_shards_tile_the_weights(tmp_path: Path, world: int) -> None:
    folder = write_random_qwen2(tmp_path / "model", heads=8, kv_heads=2, hidden=256, intermediate=512, tie=False)
    whole = load_file(folder / "model.safetensors")
    config = ModelConfig.read(folder)
    layers: list[dict[str, Matrix]] = []
    for rank in range(world):
        model = load_model(folder, config, Recorder(), torch.float32, Shard(rank, world))
        layers.append({name: layer for name, layer in model.named_modules() if isinstance(layer, Matrix)})

    def gathered(name: str, index: int = 0) -> list[Tensor]:
        return [rank[name].prepared[index] for rank in layers]

    path = "model.layers.0"
    assert torch.equal(torch.cat(gathered("lm_head")), whole["lm_head.weight"])
    assert torch.equal(torch.cat(gathered(f"{path}.self_attn.o_proj"), 1), whole[f"{path}.self_attn.o_proj.weight"])
    assert torch.equal(torch.cat(gathered(f"{path}.mlp.down_proj"), 1), whole[f"{path}.mlp.down_proj.weight"])
    gates, ups = zip(*(part.chunk(2) for part in gathered(f"{path}.mlp.gate_up_proj")), strict=True)
    assert torch.equal(torch.cat(gates), whole[f"{path}.mlp.gate_proj.weight"])
    assert torch.equal(torch.cat(ups), whole[f"{path}.mlp.up_proj.weight"])
    for index, kind in enumerate(("weight", "bias")):
        query, kv = 256 // world, 64 // min(world, 2)
        for rank, merged in enumerate(gathered(f"{path}.self_attn.qkv_proj", index)):
            q, k, v = torch.split(merged, [query, kv, kv] if world == 2 else [query, 32, 32])
            first = rank * 2 // world * 32
            assert torch.equal(q, whole[f"{path}.self_attn.q_proj.{kind}"][rank * query :][:query])
            assert torch.equal(k, whole[f"{path}.self_attn.k_proj.{kind}"][first:][: len(k)])
            assert torch.equal(v, whole[f"{path}.self_attn.v_proj.{kind}"][first:][: len(v)])
    with pytest.raises(ModelError, match="cannot be shared out over 3"):
        load_model(folder, config, Recorder(), torch.float32, Shard(0, 3))
