"""Fills a model from a folder of safetensors, one layer at a time, reading only this rank's share of each tensor."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from worker.kernels import Kernels
from worker.model.checkpoint import Checkpoint
from worker.model.config import ModelConfig
from worker.model.errors import ModelError
from worker.model.layers import Layer, Part
from worker.model.plan import MERGED, Shard, check_shares, style_of
from worker.model.qwen import CausalLM
from worker.parallel import Group

# Buffers that old checkpoints carry; we compute them.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


def load_model(
    folder: Path,
    config: ModelConfig,
    kernels: Kernels,
    dtype: torch.dtype,
    shard: Shard | None = None,
    group: Group | None = None,
) -> CausalLM:
    """Builds the model and loads its weights, cast to `dtype`: this rank's share of them.

    Args:
        shard: which share; that of `group` if None.
        group: the ranks that run the model together; loading needs no connection between them.

    Raises ModelError, naming file and tensor, for anything missing, unexpected, misshapen, of a dtype that is not
    floating point, truncated or unreadable.
    """
    group = group or Group()
    shard = shard or Shard(group.rank, group.world)
    check_shares(config, shard.world)
    model = CausalLM(config, kernels, group)
    with Checkpoint(folder) as checkpoint:
        for name, module in model.named_modules():
            if isinstance(module, Layer):
                source = "model.embed_tokens" if name == "lm_head" and config.tie_word_embeddings else name
                module.take(_read_layer(checkpoint, source, module.parts, dtype, shard))
        unexpected = [name for name in checkpoint.unread() if not _ignorable(name, config)]
        if unexpected:
            more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
            raise ModelError(
                f"{checkpoint.tensors[unexpected[0]].path}: {unexpected[0]}{more}: not part of a {config.architecture}"
            )
    return model.eval()


def _ignorable(name: str, config: ModelConfig) -> bool:
    # A tied checkpoint may still store the head, as a copy of the embedding.
    return (config.tie_word_embeddings and name == "lm_head.weight") or _IGNORED.fullmatch(name) is not None


def _read_layer(
    checkpoint: Checkpoint, name: str, parts: tuple[Part, ...], dtype: torch.dtype, shard: Shard
) -> dict[str, Tensor]:
    """A layer's merged tensors, in memory of their own: nothing keeps the files mapped."""
    stem, _, leaf = name.rpartition(".")
    sources = [f"{stem}.{stored}" for stored in MERGED[leaf]] if leaf in MERGED else [name]
    cuts = [_cut(source, part, shard) for source, part in zip(sources, parts, strict=True)]
    rows = [cut[0].stop - cut[0].start for cut in cuts]
    columns = [cut.stop - cut.start for cut in cuts[0][1:]]
    if style_of(name) == "vocab":
        rows = [shard.rows(part.shape[0]) for part in parts]
    tensors = {"weight": torch.empty(sum(rows), *columns, dtype=dtype)}
    if parts[0].bias:
        tensors["bias"] = torch.empty(sum(rows), dtype=dtype)
    offset = 0
    for source, part, cut, count in zip(sources, parts, cuts, rows, strict=True):
        real = cut[0].stop - cut[0].start
        span = slice(offset, offset + real)
        checkpoint.read_into(tensors["weight"][span], f"{source}.weight", part.shape, cut)
        tensors["weight"][offset + real : offset + count].zero_()  # padding of a vocabulary
        if part.bias:
            checkpoint.read_into(tensors["bias"][span], f"{source}.bias", part.shape[:1], cut[:1])
        offset += count
    if parts[0].bias and style_of(name) == "rowwise" and shard.rank:
        # Row-parallel outputs are summed over ranks: one of them brings the bias.
        tensors["bias"].zero_()
    return tensors


def _cut(name: str, part: Part, shard: Shard) -> tuple[slice, ...]:
    """This rank's slice of each dimension."""
    style = style_of(name)
    bounds = [(0, size) for size in part.shape]
    if style == "vocab":
        bounds[0] = shard.vocab_bounds(part.shape[0])
    elif style != "replicated":
        split = 1 if style == "rowwise" else 0
        bounds[split] = shard.bounds(part.shape[split], part.units, name)
    return tuple(slice(start, stop) for start, stop in bounds)
