"""A model's configuration, read from the config.json and generation_config.json of its folder.

Only what changes the numbers or the service is read; what would change the numbers and is not supported is refused,
never ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worker.kernels.names import QUANTIZED_FORMATS
from worker.model.errors import ModelError

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATION_FIELD = "quantization_config"
QUANTIZATION_METHOD = "qwire"
QUANTIZATION_VERSION = 1
"""Of the layout of stored quantized weights; see `worker.model.quantization`."""


@dataclass(frozen=True, slots=True)
class YarnConfig:
    """YaRN's stretch of the context; names as in config.json's rope parameters."""

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: its base and, for long contexts, YaRN."""

    theta: float
    yarn: YarnConfig | None = None


@dataclass(frozen=True, slots=True)
class DefaultSampling:
    """What the model's makers recommend, from generation_config.json; None where they say nothing."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only model of the Qwen2, Qwen3 or Llama shape."""

    architecture: str
    vocab_size: int
    """Rows of the embedding; may exceed the tokenizer's ids (padding)."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Context length in tokens, YaRN included."""
    rms_norm_eps: float
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    rope: RopeConfig
    windows: tuple[int | None, ...]
    """Per layer: the sliding window in positions, the query's own included, or None for full attention."""
    dtype: str
    """The checkpoint's own: one of `DTYPES`. Of a quantized one, that of what isn't quantized."""
    quantization: str = "none"
    """How the checkpoint is stored: "none" or one of `QUANTIZED_FORMATS`."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    default_sampling: DefaultSampling = field(default_factory=DefaultSampling)

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """Reads a model folder. Raises ModelError, naming file and field, for what is missing or not supported."""
        source = _Fields(folder / "config.json", _read_json(folder / "config.json"))
        path = folder / "generation_config.json"
        generation = _Fields(path, _read_json(path) if path.exists() else {})
        return _parse(source, generation)


class _Fields:
    """A JSON object whose values are checked as they are read."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {name}: {problem}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(name, f"expected a positive integer, got {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(name, f"expected a positive number, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, got {value!r}")
        return value

    def section(self, name: str) -> _Fields:
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise self.error(name, f"expected an object, got {value!r}")
        return _Fields(self.path, value)

    def ids(self, name: str) -> tuple[int, ...]:
        """One token id, a list of them, or nothing."""
        value = self.values.get(name)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(name, f"expected token ids, got {value!r}")
        return tuple(dict.fromkeys(ids))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value


def _parse(source: _Fields, generation: _Fields) -> ModelConfig:
    architecture = _architecture(source)
    num_layers = source.integer("num_hidden_layers")
    num_heads = source.integer("num_attention_heads")
    num_kv_heads = source.integer("num_key_value_heads", num_heads)
    hidden_size = source.integer("hidden_size")
    if num_heads % num_kv_heads:
        raise source.error("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads, {num_heads}")
    if source.values.get("head_dim") is None and hidden_size % num_heads:
        raise source.error("hidden_size", f"{hidden_size} is not a multiple of num_attention_heads, {num_heads}")
    head_dim = source.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise source.error("head_dim", f"expected an even number, got {head_dim}")
    activation = source.values.get("hidden_act", "silu")
    if activation != "silu":
        raise source.error("hidden_act", f"only silu is supported, got {activation!r}")
    if source.flag("mlp_bias", False):
        raise source.error("mlp_bias", "biases in the MLP are not supported")
    # Qwen2's file has no such field: it always has these biases, except where a file says otherwise.
    attention_bias = source.flag("attention_bias", architecture == "Qwen2ForCausalLM")
    positions = source.integer("max_position_embeddings")
    rope = _rope(source, positions)
    if rope.yarn is not None:
        positions = max(positions, int(rope.yarn.original_positions * rope.yarn.factor))
    return ModelConfig(
        architecture=architecture,
        vocab_size=source.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=source.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=positions,
        rms_norm_eps=source.number("rms_norm_eps", 1e-6),
        qkv_bias=attention_bias,
        output_bias=attention_bias and architecture != "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_word_embeddings=source.flag("tie_word_embeddings", False),
        rope=rope,
        windows=_windows(source, num_layers),
        dtype=_dtype(source),
        quantization=_quantization(source),
        eos_token_ids=generation.ids("eos_token_id") or source.ids("eos_token_id"),
        bos_token_id=next(iter(generation.ids("bos_token_id") or source.ids("bos_token_id")), None),
        pad_token_id=next(iter(generation.ids("pad_token_id") or source.ids("pad_token_id")), None),
        default_sampling=_default_sampling(generation),
    )


def _architecture(source: _Fields) -> str:
    if source.values.get("auto_map"):
        raise source.error("auto_map", "models that bring their own code are not run")
    names = source.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise source.error("architectures", f"expected one of {', '.join(ARCHITECTURES)}, got {names!r}")
    return str(names[0])


def _quantization(source: _Fields) -> str:
    fields = source.section(QUANTIZATION_FIELD)
    if not fields.values:
        return "none"
    if fields.values.get("quant_method") != QUANTIZATION_METHOD:
        raise source.error(
            f"{QUANTIZATION_FIELD}.quant_method",
            f"only checkpoints made by `qwire quantize` are supported, got {fields.values.get('quant_method')!r}",
        )
    if fields.values.get("version") != QUANTIZATION_VERSION:
        raise source.error(
            f"{QUANTIZATION_FIELD}.version",
            f"expected {QUANTIZATION_VERSION}, got {fields.values.get('version')!r}: make the folder anew",
        )
    if fields.values.get("format") not in QUANTIZED_FORMATS:
        raise source.error(
            f"{QUANTIZATION_FIELD}.format",
            f"expected one of {', '.join(QUANTIZED_FORMATS)}, got {fields.values.get('format')!r}",
        )
    return str(fields.values["format"])


def _dtype(source: _Fields) -> str:
    """transformers 5 writes "dtype", older versions "torch_dtype"."""
    name = "dtype" if source.values.get("dtype") is not None else "torch_dtype"
    value = source.values.get(name)
    value = "float32" if value is None else value
    if value not in DTYPES:
        raise source.error(name, f"expected one of {', '.join(DTYPES)}, got {value!r}")
    return str(value)


def _rope(source: _Fields, positions: int) -> RopeConfig:
    """transformers 5 writes rope_parameters; older versions rope_theta beside rope_scaling."""
    name = "rope_parameters" if source.values.get("rope_parameters") else "rope_scaling"
    fields = source.section(name)
    theta = fields.number("rope_theta", source.number("rope_theta", 10_000.0))
    kind = fields.values.get("rope_type", fields.values.get("type", "default"))
    if fields.values.get("partial_rotary_factor", 1.0) != 1.0:
        raise source.error(f"{name}.partial_rotary_factor", "only whole heads can be rotated")
    if kind == "default":
        return RopeConfig(theta)
    if kind != "yarn":
        raise source.error(f"{name}.rope_type", f"expected default or yarn, got {kind!r}")
    original = fields.integer("original_max_position_embeddings", positions)
    factor = fields.number("factor", positions / original)
    mscale, mscale_all = fields.values.get("mscale"), fields.values.get("mscale_all_dim")
    attention = _mscale(factor, mscale) / _mscale(factor, mscale_all) if mscale and mscale_all else _mscale(factor, 1.0)
    return RopeConfig(
        theta,
        YarnConfig(
            factor=factor,
            original_positions=original,
            attention_factor=fields.number("attention_factor", attention),
            beta_fast=fields.number("beta_fast", 32.0),
            beta_slow=fields.number("beta_slow", 1.0),
            truncate=fields.flag("truncate", True),
        ),
    )


def _mscale(factor: float, scale: float) -> float:
    """YaRN's correction of the attention temperature."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _windows(source: _Fields, num_layers: int) -> tuple[int | None, ...]:
    """The window applies where use_sliding_window is set, to the layers that layer_types names, or else to those from
    max_window_layers on."""
    kinds = source.values.get("layer_types")
    window = source.integer("sliding_window", 4096) if source.flag("use_sliding_window", False) else None
    if kinds is None:
        full = source.values.get("max_window_layers", 28)
        return tuple(window if layer >= full else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise source.error("layer_types", f"expected {num_layers} entries, got {kinds!r}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise source.error("layer_types", f"expected full_attention or sliding_attention, got {kind!r}")
    if window is None and "sliding_attention" in kinds:
        raise source.error("layer_types", "sliding_attention needs use_sliding_window and sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _default_sampling(generation: _Fields) -> DefaultSampling:
    def optional(name: str) -> float | None:
        value = generation.values.get(name)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
            raise generation.error(name, f"expected a number, got {value!r}")
        return None if value is None else float(value)

    top_k = optional("top_k")
    do_sample = generation.values.get("do_sample")
    return DefaultSampling(
        do_sample=generation.flag("do_sample", False) if do_sample is not None else None,
        temperature=optional("temperature"),
        top_k=None if top_k is None else int(top_k),
        top_p=optional("top_p"),
        min_p=optional("min_p"),
        repetition_penalty=optional("repetition_penalty"),
    )
