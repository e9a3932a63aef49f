"""Reading configurations: both generations of transformers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import write_random_qwen2, write_random_qwen3
from worker.model import DefaultSampling, ModelConfig, ModelError
from worker.runner import kv_bytes_per_position


def read(tmp_path: Path, **config: Any) -> ModelConfig:
    return ModelConfig.read(write_random_qwen3(tmp_path, config=config))


def test_fields(tmp_path: Path) -> None:
    generation = {"eos_token_id": [5, 3, 5], "temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}
    config = ModelConfig.read(write_random_qwen3(tmp_path, generation=generation, dtype="bfloat16"))
    assert (config.vocab_size, config.head_dim, config.max_positions, config.num_layers) == (512, 64, 4096, 2)
    assert config.qk_norm and not config.qkv_bias and config.tie_word_embeddings and config.dtype == "bfloat16"
    assert config.eos_token_ids == (5, 3) and config.bos_token_id == 1 and config.pad_token_id == 0
    assert config.default_sampling == DefaultSampling(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    assert config.windows == (None, None)
    assert kv_bytes_per_position(config, torch.bfloat16) == 2 * 2 * 1 * 64 * 2
    assert kv_bytes_per_position(config, torch.float32) == 2 * 2 * 1 * 64 * 4
    assert kv_bytes_per_position(config, torch.int8) == 2 * 2 * 1 * (64 + 4)


def test_eos_falls_back_to_config(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path)
    (folder / "generation_config.json").unlink()
    config = ModelConfig.read(folder)
    assert config.eos_token_ids == (2,) and config.default_sampling == DefaultSampling()


def test_qwen2_has_biases_unless_told(tmp_path: Path) -> None:
    with_bias = ModelConfig.read(write_random_qwen2(tmp_path / "a"))
    assert with_bias.qkv_bias and not with_bias.output_bias and not with_bias.qk_norm
    assert not ModelConfig.read(write_random_qwen2(tmp_path / "b", config={"attention_bias": False})).qkv_bias


def test_windows(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    window = {"use_sliding_window": True, "sliding_window": 8}
    assert read(tmp_path, **window, layer_types=kinds).windows == (8, None)
    assert read(tmp_path, **window, max_window_layers=1).windows == (None, 8)
    assert read(tmp_path, sliding_window=8, max_window_layers=0).windows == (None, None)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}}, "rope_parameters.rope_type"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 63}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "float8"}, "torch_dtype"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention", "full_attention"], "use_sliding_window": True}, "layer_types"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_refusals_name_file_and_field(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {field}: "):
        read(tmp_path, **change)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_unreadable_files(tmp_path: Path, content: str) -> None:
    folder = write_random_qwen3(tmp_path)
    for name in ("generation_config.json", "config.json"):
        (folder / name).write_text(content)
        with pytest.raises(ModelError, match=name):
            ModelConfig.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        ModelConfig.read(folder)


def test_bad_default_sampling(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path, generation={"top_p": "most"})
    with pytest.raises(ModelError, match=r"generation_config\.json: top_p"):
        ModelConfig.read(folder)
