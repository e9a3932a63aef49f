"""Fills a model from a folder of safetensors, some rows at a time, reading only this rank's share of each tensor.

What a layer keeps is in the backend's own layout, so every weight goes through memory twice: some rows as they are
stored, and packed. No more than `PIECE_WEIGHTS` or so of them are ever there in the first form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from worker.kernels import Kernels, PreparedLinear, QuantizedWeight, WeightSpec
from worker.kernels.interface import PACK_ROWS
from worker.kernels.quantized import Format, quantize
from worker.model.checkpoint import Checkpoint, cast
from worker.model.config import ModelConfig
from worker.model.errors import ModelError
from worker.model.layers import Head, Matrix, Part, RMSNorm
from worker.model.plan import MERGED, Shard, check_shares, stage_of, style_of
from worker.model.quantization import cut_columns, format_of, join_rows, read_rows, resolve_quantization
from worker.model.qwen import CausalLM
from worker.parallel import Group

PIECE_WEIGHTS = 4 * 1024 * 1024
EMBEDDING = "model.embed_tokens"

# Buffers that old checkpoints carry; we compute them.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


def load_model(
    folder: Path,
    config: ModelConfig,
    kernels: Kernels,
    dtype: torch.dtype,
    shard: Shard | None = None,
    group: Group | None = None,
    quantize: str = "none",
) -> CausalLM:
    """Builds the model and loads its weights: this rank's share of them.

    Args:
        dtype: what weights are kept in that are not quantized.
        shard: which share; that of `group` if None.
        group: the ranks that run the model together; loading needs no connection between them.
        quantize: what the weights of a checkpoint that is not quantized are quantized to.

    Raises ModelError, naming file and tensor, for anything missing, unexpected, misshapen, of a dtype that is not
    floating point, truncated or unreadable.
    """
    group = group or Group()
    shard = shard or Shard(group.rank, group.world)
    check_shares(config, shard.world)
    model = CausalLM(config, kernels, group)
    with Checkpoint(folder) as checkpoint:
        loader = _Loader(checkpoint, config, kernels, dtype, shard, resolve_quantization(config, quantize))
        for name, module in model.named_modules():
            if isinstance(module, RMSNorm):
                module.weight = loader.vector(f"{name}.weight", module.parts[0].shape)
            elif isinstance(module, Head) and config.tie_word_embeddings:
                embedding = model.model.embed_tokens
                # Where the embedding is in another stage, its table is read once more.
                module.prepared = loader.matrix(EMBEDDING, module) if embedding is None else embedding.prepared
            elif isinstance(module, Matrix):
                module.prepared = loader.matrix(name, module)
        unexpected = [
            name
            for name in checkpoint.unread()
            if not _ignorable(name, config) and stage_of(name, config.num_layers, group.stages) == group.stage
        ]
        if unexpected:
            more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
            raise ModelError(
                f"{checkpoint.tensors[unexpected[0]].path}: {unexpected[0]}{more}: not part of a {config.architecture}"
            )
    return model


def _ignorable(name: str, config: ModelConfig) -> bool:
    # A tied checkpoint may still store the head, as a copy of the embedding.
    return (config.tie_word_embeddings and name == "lm_head.weight") or _IGNORED.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class _Loader:
    checkpoint: Checkpoint
    config: ModelConfig
    kernels: Kernels
    dtype: torch.dtype
    shard: Shard
    quantization: str

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A norm's weight, whole on every rank."""
        return self._bias(name, shape, slice(0, shape[0])).to(self.kernels.device)

    def matrix(self, name: str, layer: Matrix) -> PreparedLinear:
        """A layer's merged weight and bias, packed."""
        stem, _, leaf = name.rpartition(".")
        sources = [f"{stem}.{stored}" for stored in MERGED[leaf]] if leaf in MERGED else [name]
        cuts = [_cut(source, part, self.shard) for source, part in zip(sources, layer.parts, strict=True)]
        vocab = style_of(name) == "vocab"
        rows = [
            self.shard.rows(part.shape[0]) if vocab else cut[0].stop - cut[0].start
            for part, cut in zip(layer.parts, cuts, strict=True)
        ]
        quantized = format_of(name, self.quantization)
        columns = cuts[0][1].stop - cuts[0][1].start
        packer = self.kernels.packer(
            WeightSpec(sum(rows), columns, self.dtype, quantized, layer.multiplied, layer.looked_up)
        )
        parts = zip(sources, layer.parts, cuts, rows, strict=True)
        for first, piece in _aligned(p for part in parts for p in self._pieces(*part, quantized)):
            packer.put(first, piece)
        bias = None
        if layer.parts[0].bias:
            stored = zip(sources, layer.parts, cuts, strict=True)
            bias = torch.cat([self._bias(f"{source}.bias", part.shape[:1], cut[0]) for source, part, cut in stored])
            if style_of(name) == "rowwise" and self.shard.rank:
                # Row-parallel outputs are summed over ranks: one of them brings the bias.
                bias.zero_()
        return packer.finish(bias)

    def _bias(self, name: str, shape: tuple[int, ...], cut: slice) -> Tensor:
        stored = self.checkpoint.find(name, shape)
        rows = self.checkpoint.rows(stored, cut.start, cut.stop)
        # Rounded to the model's dtype, as its weights are, whatever activations are kept in.
        return cast(rows, self.dtype, stored).to(self.kernels.activation_dtype(self.dtype))

    def _pieces(
        self,
        source: str,
        part: Part,
        cut: tuple[slice, ...],
        count: int,
        format: Format | None,  # noqa: A002
    ) -> Iterator[Tensor | QuantizedWeight]:
        """This rank's rows of one stored weight, some at a time, and zeros up to `count` of them."""
        rows, columns = cut
        at_once = _rows_at_once(part.shape[1])
        spans = [(start, min(start + at_once, rows.stop)) for start in range(rows.start, rows.stop, at_once)]
        name = f"{source}.weight"
        if self.config.quantization != "none" and format is not None:
            shape = (part.shape[0], part.shape[1])
            for span in spans:
                quantized = read_rows(self.checkpoint, source, shape, format, *span)
                yield cut_columns(quantized, columns.start, columns.stop, name)
        else:
            stored = self.checkpoint.find(name, part.shape)
            for span in spans:
                piece = self.checkpoint.rows(stored, *span)
                if format is None:
                    yield cast(piece[:, columns], self.dtype, stored)
                else:
                    # Whole rows, so that ranks see the groups and scales that one of them alone would.
                    yield cut_columns(quantize(piece, format), columns.start, columns.stop, name)
        padding = count - (rows.stop - rows.start)
        if padding:
            zeros = torch.zeros(padding, columns.stop - columns.start, dtype=self.dtype)
            yield zeros if format is None else quantize(zeros, format)


def _rows_at_once(columns: int) -> int:
    return max(1, PIECE_WEIGHTS // columns // PACK_ROWS) * PACK_ROWS


def _aligned(pieces: Iterator[Tensor | QuantizedWeight]) -> Iterator[tuple[int, Tensor | QuantizedWeight]]:
    """The same rows, each piece with the number of its first; all but the last hold a multiple of `PACK_ROWS`."""
    held: list[Tensor | QuantizedWeight] = []
    first = count = 0
    for piece in pieces:
        held.append(piece)
        count += piece.out_features if isinstance(piece, QuantizedWeight) else piece.shape[0]
        if count % PACK_ROWS == 0:
            yield first, join_rows(held)
            held, first = [], count
    if held:
        yield first, join_rows(held)


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
