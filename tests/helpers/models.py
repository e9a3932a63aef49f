"""Small random checkpoints in the layout that transformers writes, without importing transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

QWEN2, QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"


def write_random_qwen3(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 64,
    intermediate: int | None = None,
    vocab: int = 512,
    tie: bool = True,
    seed: int = 0,
    logit_std: float = 1.5,
    dtype: str = "float32",
    shards: int = 1,
    max_positions: int = 4096,
    config: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """A Qwen3 (head norms, no biases, head_dim of its own). `config` and `generation` override fields of the files."""
    extra = {"head_dim": head_dim, "attention_bias": False, **(config or {})}
    sizes = _Sizes(layers, hidden, heads, kv_heads, head_dim, intermediate or 2 * hidden, vocab, max_positions)
    return _write(folder, QWEN3, sizes, tie, seed, logit_std, dtype, shards, extra, generation or {})


def write_random_qwen2(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 2,
    kv_heads: int = 1,
    intermediate: int | None = None,
    vocab: int = 512,
    tie: bool = True,
    seed: int = 0,
    logit_std: float = 1.5,
    dtype: str = "float32",
    shards: int = 1,
    max_positions: int = 4096,
    config: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """A Qwen2 or Qwen2.5 (biases on q, k and v, no head norms, head_dim = hidden / heads)."""
    sizes = _Sizes(layers, hidden, heads, kv_heads, hidden // heads, intermediate or 2 * hidden, vocab, max_positions)
    return _write(folder, QWEN2, sizes, tie, seed, logit_std, dtype, shards, config or {}, generation or {})


class _Sizes:
    def __init__(
        self, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, inner: int, vocab: int, positions: int
    ) -> None:
        self.layers, self.hidden, self.heads, self.kv_heads = layers, hidden, heads, kv_heads
        self.head_dim, self.inner, self.vocab, self.positions = head_dim, inner, vocab, positions


def _write(
    folder: Path,
    architecture: str,
    sizes: _Sizes,
    tie: bool,
    seed: int,
    logit_std: float,
    dtype: str,
    shards: int,
    extra: Mapping[str, Any],
    generation: Mapping[str, Any],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [architecture],
        "model_type": "qwen3" if architecture == QWEN3 else "qwen2",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": sizes.positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": tie,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **extra,
    }
    tensors = random_tensors(architecture, sizes, tie, seed, logit_std, bool(extra.get("attention_bias", True)))
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **generation}, indent=2)
    )
    save_sharded(folder, tensors, shards)
    return folder


def random_tensors(
    architecture: str, sizes: _Sizes, tie: bool, seed: int, logit_std: float, bias: bool
) -> dict[str, Tensor]:
    """Weights under which every layer matters and logits have about `logit_std` as their standard deviation."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    def norm(size: int) -> Tensor:
        return 1.0 + normal(size, std=0.1)

    hidden, inner = sizes.hidden, sizes.inner
    query, key = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    # The last norm leaves rows of about unit size, so a head of this scale gives logits of the wanted spread.
    tensors = {"model.embed_tokens.weight": normal(sizes.vocab, hidden, std=logit_std / hidden**0.5)}
    if not tie:
        tensors["lm_head.weight"] = normal(sizes.vocab, hidden, std=logit_std / hidden**0.5)
    for layer in range(sizes.layers):
        path = f"model.layers.{layer}"
        tensors[f"{path}.input_layernorm.weight"] = norm(hidden)
        tensors[f"{path}.post_attention_layernorm.weight"] = norm(hidden)
        for name, size in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            tensors[f"{path}.self_attn.{name}.weight"] = normal(size, hidden, std=hidden**-0.5)
            if architecture == QWEN2 and bias:
                tensors[f"{path}.self_attn.{name}.bias"] = normal(size, std=0.3)
        tensors[f"{path}.self_attn.o_proj.weight"] = normal(hidden, query, std=query**-0.5)
        if architecture == QWEN3:
            tensors[f"{path}.self_attn.q_norm.weight"] = norm(sizes.head_dim)
            tensors[f"{path}.self_attn.k_norm.weight"] = norm(sizes.head_dim)
        tensors[f"{path}.mlp.gate_proj.weight"] = normal(inner, hidden, std=hidden**-0.5)
        tensors[f"{path}.mlp.up_proj.weight"] = normal(inner, hidden, std=hidden**-0.5)
        tensors[f"{path}.mlp.down_proj.weight"] = normal(hidden, inner, std=inner**-0.5)
    tensors["model.norm.weight"] = norm(hidden)
    return tensors


def save_sharded(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    """One model.safetensors, or `shards` files and their index, named as transformers names them."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    names = sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[shard::shards]
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(chosen, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
