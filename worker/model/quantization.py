"""Which weights are quantized, and how a folder stores them.

All weights that are multiplied or looked up are quantized; norms and biases are not. With int4, the embedding and the
output layer keep 8 bits: few weights of most models, and those that quality depends on most.

A stored quantized model is a folder like any other, whose config.json says

    "quantization_config": {"quant_method": "qwire", "version": 1, "format": "int8" or "int4"}

and whose safetensors hold, in place of `X.weight` [out, in], with G groups of 128 (int8) or 32 (int4) a row:

    X.weight         int8: I8 [out, in]; int4: U8 [out, ceil(in / 2)], weight 2i in the low half of byte i
    X.weight_scale   BF16 [out, G]
    X.weight_zero    U8 [out, G], int4 only

`worker.kernels.quantized` says what the numbers mean. In an int4 folder, the int8 weights are those that are stored I8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.kernels.quantized import GROUP, Format, QuantizedWeight, groups
from worker.model.checkpoint import Checkpoint, StoredTensor
from worker.model.config import ModelConfig
from worker.model.errors import ModelError

_WIDE = ("model.embed_tokens", "lm_head")
_STORED = {"int8": ("I8",), "int4": ("U8",)}
_SCALES = ("BF16",)
_ZEROS = ("U8",)


def resolve_quantization(config: ModelConfig, quantize: str) -> str:
    """How a model is run: as it is stored, else as asked. Raises ModelError where that is not the same."""
    if config.quantization == "none":
        return quantize
    if quantize not in ("none", config.quantization):
        raise ModelError(f"quantize: {quantize} was asked for, but the checkpoint is {config.quantization} already")
    return config.quantization


def format_of(name: str, quantization: str) -> Format | None:
    """The format of a weight named as in a checkpoint, without ".weight"; None if it is not quantized."""
    if quantization == "none":
        return None
    return "int8" if quantization == "int8" or name in _WIDE else "int4"


def stored_tensors(name: str, shape: tuple[int, int], format: Format) -> dict[str, tuple[str, tuple[int, int]]]:  # noqa: A002
    """What stores a weight named `name` of this shape: tensors' names to safetensors' dtypes and shapes."""
    rows, columns = shape
    per_row = groups(format, columns)
    tensors = {
        f"{name}.weight": (_STORED[format][0], (rows, columns if format == "int8" else -(-columns // 2))),
        f"{name}.weight_scale": (_SCALES[0], (rows, per_row)),
    }
    if format == "int4":
        tensors[f"{name}.weight_zero"] = (_ZEROS[0], (rows, per_row))
    return tensors


def find_stored(checkpoint: Checkpoint, name: str, shape: tuple[int, int], format: Format) -> list[StoredTensor]:  # noqa: A002
    """The tensors that store a quantized weight: q, scale and, of int4, zero. Raises ModelError."""
    return [
        checkpoint.find(stored, size, (dtype,)) for stored, (dtype, size) in stored_tensors(name, shape, format).items()
    ]


def cut_columns(weight: QuantizedWeight, start: int, stop: int, name: str) -> QuantizedWeight:
    """Some input features of a weight. Raises ModelError where that would cut a group."""
    size = GROUP[weight.format]
    if (start, stop) == (0, weight.in_features):
        return weight
    if start % size or (stop % size and stop != weight.in_features):
        raise ModelError(
            f"{name}: {weight.format} weights can't be cut at input features {start} and {stop}: ranks can share out "
            f"whole groups of {size} only"
        )
    q = weight.q[:, start:stop] if weight.format == "int8" else weight.q[:, start // 2 : -(-stop // 2)]
    span = slice(start // size, -(-stop // size))
    zero = None if weight.zero is None else weight.zero[:, span]
    return QuantizedWeight(weight.format, stop - start, q, weight.scale[:, span], zero)


def join_rows(parts: Sequence[Tensor | QuantizedWeight]) -> Tensor | QuantizedWeight:
    """Parts of one weight, all of a kind, under each other."""
    if len(parts) == 1:
        return parts[0]
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    if not quantized:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    zeros = [part.zero for part in quantized if part.zero is not None]
    return QuantizedWeight(
        quantized[0].format,
        quantized[0].in_features,
        torch.cat([part.q for part in quantized]),
        torch.cat([part.scale for part in quantized]),
        torch.cat(zeros) if zeros else None,
    )
