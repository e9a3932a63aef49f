"""Folders with quantized weights: what `qwire quantize` writes is what quantizing while loading gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from tests.helpers.models import write_random_qwen2, write_random_qwen3
from tests.helpers.steps import logits_of, table
from tests.helpers.tokenizers import tiny_tokenizer_json, write_tokenizer
from worker.kernels import QUANTIZED_FORMATS, ReferenceKernels
from worker.kernels.quantized import Format
from worker.model import ModelConfig, ModelError, Shard, load_model
from worker.output import OutputError
from worker.quantize import quantize_command, quantize_folder
from worker.runner import TorchRunner

IDS = [(11 * i) % 512 for i in range(70)]


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
@pytest.mark.parametrize("tie", [True, False])
def test_stored_is_what_loading_makes(tmp_path: Path, format: Format, tie: bool) -> None:  # noqa: A002
    source = write_random_qwen2(tmp_path / "in", hidden=160, heads=2, tie=tie, dtype="bfloat16", shards=2)
    quantize_folder(source, tmp_path / "out", format)
    stored = TorchRunner(tmp_path / "out", num_blocks=8)
    loaded = TorchRunner(source, num_blocks=8, quantize=format)
    assert (stored.quantization, loaded.quantization) == (format, format)
    blocks = table(0, len(IDS), 16)
    expected = logits_of(loaded, IDS, blocks, [70])
    assert torch.equal(logits_of(stored, IDS, blocks, [70]), expected)
    plain = logits_of(TorchRunner(source, num_blocks=8), IDS, blocks, [70])
    error = float((expected - plain).norm() / plain.norm())
    assert 0.0 < error < {"int8": 0.05, "int4": 0.4}[format]


def test_int4_is_calibrated_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    """Weights differ from rounded ones, and the model is nearer to itself on such a text."""
    source = write_random_qwen3(tmp_path / "in", heads=4, kv_heads=2, dtype="bfloat16")
    text = tmp_path / "text.txt"
    text.write_text("Rain fell on the harbour all night, and in the morning it was falling still. " * 20)
    ids = list(text.read_bytes()[:70])  # as good as any: the tokenizer knows bytes alone
    quantize_folder(source, tmp_path / "rounded", "int4")
    write_tokenizer(source, tiny_tokenizer_json())
    quantize_folder(source, tmp_path / "calibrated", "int4", text=text)
    blocks = table(0, len(ids), 16)
    plain, rounded, calibrated = (
        logits_of(TorchRunner(folder, num_blocks=8, kernels=ReferenceKernels()), ids, blocks, [70])
        for folder in (source, tmp_path / "rounded", tmp_path / "calibrated")
    )
    assert (calibrated - plain).norm() < 0.9 * (rounded - plain).norm()


def test_texts_and_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    source = write_tokenizer(write_random_qwen3(tmp_path / "in"), tiny_tokenizer_json())
    text = tmp_path / "text.txt"
    text.write_text("")
    with pytest.raises(ModelError, match=r"text\.txt: has nothing to calibrate on"):
        quantize_folder(source, tmp_path / "out", "int4", text=text)
    text.write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"text\.txt: cannot be read"):
        quantize_folder(source, tmp_path / "out", "int4", text=text)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        quantize_folder(source, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_what_a_folder_holds(tmp_path: Path) -> None:
    source = write_random_qwen3(tmp_path / "in", tie=False, dtype="bfloat16")
    write_tokenizer(source, tiny_tokenizer_json())
    (source / "chat_template.jinja").write_text("template")
    (source / "weights.bin").write_text("not copied")
    (tmp_path / "text.txt").write_text("A short text. " * 40)
    quantize_folder(source, tmp_path / "out", "int4", text=tmp_path / "text.txt")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "qwire", "version": 1, "format": "int4"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        name = "model.layers.0.mlp.down_proj"
        shapes = {key: (file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes[f"{name}.weight"] == ("U8", [128, 128])
    assert shapes[f"{name}.weight_scale"] == ("BF16", [128, 8])
    assert shapes[f"{name}.weight_zero"] == ("U8", [128, 8])
    assert shapes["lm_head.weight"] == ("I8", [512, 128])
    assert shapes["lm_head.weight_scale"] == ("BF16", [512, 1])
    assert shapes["model.norm.weight"] == ("BF16", [128])


@pytest.mark.parametrize("format", QUANTIZED_FORMATS)
def test_ranks_share_out_whole_groups(tmp_path: Path, format: Format) -> None:  # noqa: A002
    """Ranks' shares hold the numbers that one rank has, stored or quantized while loading; and cut no group."""
    source = write_random_qwen3(tmp_path / "in", heads=4, kv_heads=2, head_dim=64, intermediate=256)
    quantize_folder(source, tmp_path / "out", format)

    def down(folder: Path, shard: Shard, quantize: str = "none") -> torch.Tensor:
        config = ModelConfig.read(folder)
        model = load_model(folder, config, ReferenceKernels(), torch.float32, shard, quantize=quantize)
        prepared = model.model.layers[0].mlp.down_proj.prepared
        weight: torch.Tensor = prepared.weight
        return weight.to_dense() if weight.is_mkldnn else weight

    whole = down(tmp_path / "out", Shard())
    for folder, quantize in ((tmp_path / "out", "none"), (source, format)):
        shares = [down(folder, Shard(rank, 2), quantize) for rank in (0, 1)]
        assert torch.equal(torch.cat(shares, 1), whole)
    narrow = write_random_qwen3(tmp_path / "narrow", heads=4, kv_heads=2, intermediate=160)
    with pytest.raises(ModelError, match=r"can't be cut at input features .* whole groups"):
        down(narrow, Shard(1, 4), format)


def test_refusals(tmp_path: Path) -> None:
    source = write_random_qwen3(tmp_path / "in")
    quantize_folder(source, tmp_path / "out", "int8")
    with pytest.raises(ModelError, match="is int8 already"):
        quantize_folder(tmp_path / "out", tmp_path / "again", "int4")
    with pytest.raises(OutputError, match="already exists"):
        quantize_folder(source, tmp_path / "out", "int4")
    with pytest.raises(ModelError, match="int4 was asked for, but the checkpoint is int8"):
        TorchRunner(tmp_path / "out", num_blocks=1, quantize="int4")
    TorchRunner(tmp_path / "out", num_blocks=1, quantize="int8")
    config = tmp_path / "out" / "config.json"
    fields = json.loads(config.read_text())
    for change, says in (
        ({"version": 2}, r"quantization_config\.version: expected 1, got 2"),
        ({"format": "int3"}, r"quantization_config\.format: expected one of int8, int4"),
        ({"quant_method": "awq"}, r"quantization_config\.quant_method: only checkpoints made by"),
    ):
        config.write_text(json.dumps(fields | {"quantization_config": fields["quantization_config"] | change}))
        with pytest.raises(ModelError, match=says):
            ModelConfig.read(tmp_path / "out")
    assert not (tmp_path / "again").exists()


def test_command(tmp_path: Path) -> None:
    source = write_random_qwen3(tmp_path / "in")
    arguments = [str(source), str(tmp_path / "out"), "--format", "int8"]
    assert CliRunner().invoke(quantize_command, arguments).exit_code == 0
    int4 = CliRunner().invoke(quantize_command, [str(source), str(tmp_path / "int4"), "--format", "int4"])
    assert int4.exit_code == 0 and "without calibration" in int4.output
    again = CliRunner().invoke(quantize_command, arguments)
    assert again.exit_code == 1 and "already exists" in again.output
