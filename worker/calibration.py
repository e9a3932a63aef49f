"""What a model's layers see of a text: second moments of their rows, for quantizing their weights with less error.

All sequences go through one layer before the next, so that no more than one layer's moments and cache are ever there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from worker.engine.plan import Chunk, StepPlan
from worker.kernels import KVCache, choose_kernels, usable_cpus
from worker.kernels.reference.dense import silu_mul
from worker.model import ModelConfig, ModelError, load_model
from worker.model.layers import Linear
from worker.model.plan import MERGED
from worker.model.qwen import Buffers, StepInputs
from worker.model.rope import rotation_table
from worker.runner.batch import build_step
from worker.runner.runner import resolve_dtype

TEXT = Path(__file__).with_name("calibration.txt")
SEQUENCE, SEQUENCES = 512, 16
"""Tokens of a sequence, and how many at most."""
_BLOCK_SIZE = 16

Moments = dict[str, Tensor]
"""By a weight's name in the checkpoint, without ".weight": float32 [in, in], the sum of x xᵀ over the rows x it met."""


def tokenize(folder: Path, text: Path) -> list[list[int]]:
    """The first ids of a text, in sequences. Raises ModelError for an unreadable tokenizer or text, or an empty one."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{folder / 'tokenizer.json'}: cannot be read: {error}") from error
    try:
        ids: list[int] = tokenizer.encode(text.read_text(encoding="utf-8")).ids
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{text}: cannot be read: {error}") from error
    if not ids:
        raise ModelError(f"{text}: has nothing to calibrate on")
    return [ids[start : start + SEQUENCE] for start in range(0, min(len(ids), SEQUENCE * SEQUENCES), SEQUENCE)]


class _Watched(Linear):
    """A layer that adds up its rows' moments."""

    def __init__(self, watched: Linear) -> None:
        super().__init__(watched.kernels, *watched.parts)
        self.watched = watched
        columns = watched.parts[0].shape[1]
        self.moments = torch.zeros(columns, columns)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        rows = (silu_mul(x) if self.watched.gated else x).to(torch.float32)
        self.moments.addmm_(rows.t(), rows)
        return self.watched(x, out)


def layer_moments(folder: Path, sequences: Sequence[Sequence[int]]) -> Iterator[Moments]:
    """The moments of each decoder layer's weights, layer by layer. Raises ModelError for an unusable model."""
    config = ModelConfig.read(folder)
    kernels = choose_kernels(head_dim=config.head_dim, threads=len(usable_cpus())).kernels
    dtype = resolve_dtype(config, "auto")
    model = load_model(folder, config, kernels, dtype)
    embedding = model.model.embed_tokens
    if embedding is None:
        raise RuntimeError("a stage of a model was loaded, not the whole")
    blocks = tuple(range(-(-max(map(len, sequences)) // _BLOCK_SIZE)))
    cos, sin = rotation_table(config.rope, config.head_dim, SEQUENCE)
    shape = (config.num_kv_heads, len(blocks), _BLOCK_SIZE, config.head_dim)
    cache = KVCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
    windows = tuple(dict.fromkeys(config.windows))
    buffers = Buffers(kernels.activation_dtype(dtype), kernels.device)
    steps: list[StepInputs] = []
    states: list[tuple[Tensor, Tensor | None]] = []
    for ids in sequences:
        step = build_step(
            StepPlan((Chunk(tuple(ids), 0, blocks),)),
            num_blocks=len(blocks),
            block_size=_BLOCK_SIZE,
            max_positions=SEQUENCE,
            vocab_size=config.vocab_size,
        )
        positions = torch.from_numpy(step.positions)
        attention = kernels.plan_attention(step.ragged, config.num_kv_heads, windows)
        steps.append(StepInputs(cos[positions], sin[positions], torch.from_numpy(step.slots), attention, buffers))
        states.append((embedding(torch.from_numpy(step.ids)), None))
    for index, layer in enumerate(model.model.layers):
        watched: dict[str, _Watched] = {}
        for path, part in list(layer.named_modules(f"model.layers.{index}")):
            for leaf, child in list(vars(part).items()):
                if isinstance(child, Linear):
                    watched[f"{path}.{leaf}"] = one = _Watched(child)
                    setattr(part, leaf, one)
        for number, (x, residual) in enumerate(states):
            x, residual = layer(x, residual, steps[number], cache)
            # Buffers may hold them, which the next sequence writes to.
            states[number] = x.clone(), residual.clone()
        found = {}
        for name, one in watched.items():
            stem, _, leaf = name.rpartition(".")
            found.update({f"{stem}.{stored}": one.moments for stored in MERGED.get(leaf, (leaf,))})
        yield found
