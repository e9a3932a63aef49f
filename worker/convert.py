"""GGUF to a model folder: the llama architecture, any quantization that the gguf package can expand.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A Llama block is a Qwen2 block without biases.
Weights become the float32 values that the quantized ones stand for.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from worker.output import OutputError, whole_folder

ARCHITECTURE = "llama"
_CONTROL, _USER_DEFINED = 3, 4  # gguf's token types
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError)
"""What the gguf package raises on a file that is not what it claims to be."""

Progress = Callable[[int, int], None]
"""Called with (tensors written, tensors in all)."""


class ConvertError(Exception):
    """A file that cannot be converted; the message says which and why."""


@dataclass(frozen=True, slots=True)
class _Target:
    """One tensor to write: its source, its name, its [out, in] shape, and the heads its rows are permuted by."""

    source: ReaderTensor
    name: str
    shape: tuple[int, ...]
    permuted_heads: int | None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * 4

    def values(self) -> npt.NDArray[np.float32]:
        values = np.ascontiguousarray(dequantize(self.source.data, self.source.tensor_type), np.float32)
        values = values.reshape(self.shape)
        if self.permuted_heads is not None:
            # GGUF stores the rows of a head as (0, D/2), (1, D/2 + 1), …: pairs side by side, for interleaved RoPE.
            rows = self.shape[0] // self.permuted_heads
            values = values.reshape(self.permuted_heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(self.shape)
        return np.ascontiguousarray(values)


def convert_gguf(gguf_path: Path, out_folder: Path, progress: Progress | None = None) -> None:
    """Writes config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    `gguf_path` is a file, or a folder that holds exactly one .gguf. The folder appears whole or not at all; it must not
    exist yet. Raises ConvertError for another architecture or a damaged file, and OutputError where the result cannot
    be written.
    """
    path = _one_file(gguf_path)
    if out_folder.exists():
        raise OutputError(f"{out_folder}: already exists")
    try:
        reader = GGUFReader(path)
        fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        config, targets = _config(path, fields, reader.tensors)
        generation = _generation_config(fields)
        tokenizer, tokenizer_config = _tokenizer(path, fields), _tokenizer_config(fields)
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise ConvertError(f"{path}: damaged, truncated or not a GGUF file: {error}") from error
    with whole_folder(out_folder) as folder:
        try:
            _write_safetensors(folder / "model.safetensors", targets, progress)
        except _DAMAGE as error:
            raise ConvertError(f"{path}: damaged or truncated: {error}") from error
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", generation)
        _write_json(folder / "tokenizer_config.json", tokenizer_config)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def _one_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise ConvertError(f"{path}: expected exactly one .gguf file, found {len(found)}")
    return found[0]


def _config(path: Path, fields: dict[str, Any], tensors: list[ReaderTensor]) -> tuple[dict[str, Any], list[_Target]]:
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ConvertError(f"{path}: general.architecture: expected {ARCHITECTURE!r}, found {architecture!r}")

    def need(name: str) -> Any:
        if f"{ARCHITECTURE}.{name}" not in fields:
            raise ConvertError(f"{path}: {ARCHITECTURE}.{name}: missing")
        return fields[f"{ARCHITECTURE}.{name}"]

    for name, plain in (("rope.scaling.type", "none"), ("expert_count", 0)):
        if fields.get(f"{ARCHITECTURE}.{name}", plain) != plain:
            raise ConvertError(f"{path}: {ARCHITECTURE}.{name}: {need(name)!r} is not supported")
    hidden, inner, layers = need("embedding_length"), need("feed_forward_length"), need("block_count")
    heads = need("attention.head_count")
    kv_heads = fields.get(f"{ARCHITECTURE}.attention.head_count_kv", heads)
    head_dim = fields.get(f"{ARCHITECTURE}.attention.key_length", hidden // heads)
    if fields.get(f"{ARCHITECTURE}.rope.dimension_count", head_dim) != head_dim:
        raise ConvertError(f"{path}: {ARCHITECTURE}.rope.dimension_count: only whole heads can be rotated")
    vocab = len(fields["tokenizer.ggml.tokens"])
    stored = {tensor.name: tensor for tensor in tensors}
    tied = "output.weight" not in stored
    wanted: dict[str, tuple[str, tuple[int, ...], int | None]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden), None),
        "output_norm.weight": ("model.norm.weight", (hidden,), None),
    }
    if not tied:
        wanted["output.weight"] = ("lm_head.weight", (vocab, hidden), None)
    for layer in range(layers):
        for source, (target, shape, permuted) in {
            "attn_norm": ("input_layernorm", (hidden,), None),
            "attn_q": ("self_attn.q_proj", (heads * head_dim, hidden), heads),
            "attn_k": ("self_attn.k_proj", (kv_heads * head_dim, hidden), kv_heads),
            "attn_v": ("self_attn.v_proj", (kv_heads * head_dim, hidden), None),
            "attn_output": ("self_attn.o_proj", (hidden, heads * head_dim), None),
            "ffn_norm": ("post_attention_layernorm", (hidden,), None),
            "ffn_gate": ("mlp.gate_proj", (inner, hidden), None),
            "ffn_up": ("mlp.up_proj", (inner, hidden), None),
            "ffn_down": ("mlp.down_proj", (hidden, inner), None),
        }.items():
            wanted[f"blk.{layer}.{source}.weight"] = (f"model.layers.{layer}.{target}.weight", shape, permuted)
    targets = []
    for name, (target, shape, permuted) in wanted.items():
        if name not in stored:
            raise ConvertError(f"{path}: {name}: missing")
        found = tuple(int(size) for size in reversed(stored[name].shape))
        if found != shape:
            raise ConvertError(f"{path}: {name}: expected shape {list(shape)}, found {list(found)}")
        targets.append(_Target(stored[name], target, shape, permuted))
    unknown = [name for name in stored if name not in wanted]
    if unknown:
        raise ConvertError(f"{path}: {unknown[0]}: not part of a plain {ARCHITECTURE} model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        # Stored as float32: back to the few digits that its makers wrote.
        "rms_norm_eps": float(f"{need('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(fields.get(f"{ARCHITECTURE}.rope.freq_base", 10_000.0)),
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "vocab_size": vocab,
        **_generation_config(fields),
    }
    return config, targets


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    stops = list(dict.fromkeys(ids[name] for name in ("eos", "eot") if ids[name] is not None))
    config = {
        "bos_token_id": ids["bos"],
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": ids["padding"],
    }
    return {name: value for name, value in config.items() if value is not None and value != []}


def _tokenizer(path: Path, fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE as tokenizer.json holds it."""
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise ConvertError(f"{path}: tokenizer.ggml.model: expected 'gpt2' (byte-level BPE), found {kind!r}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pre_tokenizer: pre_tokenizers.PreTokenizer
    if split == "smollm":
        pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif split in ("gpt-2", "default"):
        pre_tokenizer = byte_level
    else:
        raise ConvertError(f"{path}: tokenizer.ggml.pre: {split!r} is not supported")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise ConvertError(f"{path}: tokenizer.ggml.tokens: a token comes up twice, or has no type")
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == _USER_DEFINED]
    )
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if fields.get("tokenizer.ggml.add_bos_token", False) and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields[f"{ARCHITECTURE}.context_length"],
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{name}_token"] = tokens[index]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return config


def _write_safetensors(path: Path, targets: list[_Target], progress: Progress | None) -> None:
    """Tensor by tensor, so that no more than one is held in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for target in targets:
        end = offset + target.nbytes
        header[target.name] = {"dtype": "F32", "shape": list(target.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for done, target in enumerate(targets, 1):
            file.write(target.values().astype("<f4", copy=False).data)
            if progress is not None:
                progress(done, len(targets))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@click.command("convert")
@click.argument("gguf", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def convert_command(gguf: Path, out: Path) -> None:
    """Turn the GGUF file (or folder holding one) into the model folder OUT."""
    with click.progressbar(length=1, label="Converting", show_pos=True) as bar:

        def advance(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        try:
            convert_gguf(gguf, out, advance)
        except (ConvertError, OutputError) as error:
            raise click.ClickException(str(error)) from error
    click.echo(f"{out}: written")
