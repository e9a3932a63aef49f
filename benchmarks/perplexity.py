"""What quantization costs: perplexity of the demo model on a fixed text, and the error of Gaussian weights.

    python -m benchmarks.perplexity [--json]

The demo model's weights were made from 4-bit ones, which a 4-bit format could copy exactly. So its residual stream is
rotated first: norms' weights are folded into the layers behind them, and a random orthogonal matrix Q into whatever
reads or writes the stream (Ashkboos et al., "QuaRot", 2024, section 3). x Q has the norm of x, so the function stays.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import gguf.quants
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from qwire import hub
from worker.engine.plan import Chunk, StepPlan
from worker.kernels import QUANTIZED_FORMATS, choose_kernels, usable_cpus
from worker.kernels.quantized import bits_per_weight, dequantize, quantize
from worker.model import ModelConfig
from worker.quantize import quantize_folder
from worker.runner.runner import TorchRunner

TEXT = Path(__file__).with_name("perplexity.txt")
WINDOW = 1024
STEP = 256
BLOCK_SIZE = 16


def rotate(source: Path, target: Path, seed: int = 0) -> Path:
    """Writes the model of `source`, rotated, to the folder `target`; tied weights come apart. Float64 arithmetic."""
    config = ModelConfig.read(source)
    weights = {name: tensor.double() for name, tensor in load_file(source / "model.safetensors").items()}
    size = config.hidden_size
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double())
    embedding = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", embedding)
    weights["lm_head.weight"] = (head * weights["model.norm.weight"]) @ turn
    weights["model.embed_tokens.weight"] = embedding @ turn
    for layer in range(config.num_layers):
        path = f"model.layers.{layer}"
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for reader in readers:
                name = f"{path}.{reader}.weight"
                weights[name] = (weights[name] * weights[f"{path}.{norm}.weight"]) @ turn
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"{path}.{writer}.weight"] = turn.T @ weights[f"{path}.{writer}.weight"]
    for name in weights:
        if name.endswith("norm.weight") and not name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] = torch.ones_like(weights[name])
    target.mkdir(parents=True)
    save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, target / "model.safetensors")
    fields = json.loads((source / "config.json").read_bytes()) | {"tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(fields))
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    return target


def perplexity(runner: TorchRunner, ids: list[int]) -> float:
    """exp of the mean negative logarithm of each id's probability, in windows that start with the first of the text."""
    losses = []
    for start in range(0, len(ids) - 1, WINDOW - 1):
        window = ids[:1] + ids[start + 1 : start + WINDOW]
        table = range(-(-len(window) // BLOCK_SIZE))
        for first in range(0, len(window) - 1, STEP):
            piece = window[first : min(first + STEP, len(window) - 1)]
            logits = runner.forward_logits(StepPlan((Chunk(piece, first, table),)))
            wanted = torch.tensor(window[first + 1 : first + 1 + len(piece)])
            losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double())
    return math.exp(float(torch.cat(losses).mean()))


def weight_errors() -> dict[str, tuple[float, float]]:
    """Bits a weight, and error relative to the weights' own size, of Gaussian weights. One bit more halves the error of
    any format, so gguf's come a second time, at our bits.
    """
    weights = torch.randn(1024, 3072, generator=torch.Generator().manual_seed(0)) * 0.02

    def error(again: Tensor) -> float:
        return float((again - weights).norm() / weights.norm())

    found: dict[str, tuple[float, float]] = {}
    for ours in QUANTIZED_FORMATS:
        found[ours] = (bits_per_weight(ours), error(dequantize(quantize(weights, ours))))
    for ours, kind, bits in (("int8", GGMLQuantizationType.Q8_0, 8.5), ("int4", GGMLQuantizationType.Q4_1, 5.0)):
        stored = gguf.quants.quantize(weights.numpy(), kind)
        theirs, own = error(torch.from_numpy(gguf.quants.dequantize(stored, kind))), found[ours][0]
        found[f"gguf {kind.name}"] = (bits, theirs)
        found[f"gguf {kind.name}, scaled"] = (own, theirs * 2 ** (bits - own))
    return found


@click.command()
@click.option("--model", default=hub.DEMO, help="Folder, hub id or demo; of the Llama or Qwen2 shape.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def main(model: str, as_json: bool) -> None:
    """Prints perplexities and errors."""
    folder = hub.resolve(model, sys.stderr)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT.read_text(encoding="utf-8")).ids
    threads = len(usable_cpus())
    kernels = choose_kernels(threads=threads).kernels
    torch.set_num_threads(threads)
    values: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        rotated = rotate(folder, Path(scratch) / "rotated")
        calibrated = Path(scratch) / "int4"
        quantize_folder(rotated, calibrated, "int4")
        cases: dict[str, dict[str, Any]] = {
            "float32, not rotated": {"folder": folder, "dtype": "float32"},
            "float32": {"folder": rotated, "dtype": "float32"},
            "bfloat16": {"folder": rotated, "dtype": "bfloat16"},
            "int8": {"folder": rotated, "dtype": "bfloat16", "quantize": "int8"},
            "int4": {"folder": calibrated, "dtype": "bfloat16"},
            "int4, while loading": {"folder": rotated, "dtype": "bfloat16", "quantize": "int4"},
        }
        for name, case in cases.items():
            runner = TorchRunner(case.pop("folder"), num_blocks=WINDOW // BLOCK_SIZE, kernels=kernels, **case)
            values[name] = perplexity(runner, ids)
    errors = weight_errors()
    if as_json:
        told = {name: {"bits": bits, "relative_error": error} for name, (bits, error) in errors.items()}
        print(json.dumps({"model": folder.name, "tokens": len(ids), "perplexity": values, "weights": told}))
        return
    print(f"{model}, {len(ids)} tokens, {kernels.name} {kernels.isa}")
    for name, value in values.items():
        print(f"{name:<22}{value:>9.4f}  {value / values['bfloat16'] - 1:>+7.2%} against bfloat16")
    print("relative error of Gaussian weights")
    for name, (bits, error) in errors.items():
        print(f"{name:<22}{bits:>7.3f} bits {error:>9.5f}")


if __name__ == "__main__":
    main()
