"""Fills a model from a folder of safetensors, some rows at a time, reading only this rank's share of each tensor.

What a layer keeps is in the backend's own layout, so every weight goes through memory twice: some rows as they are
stored, and packed. No more than `PIECE_WEIGHTS` or so of them are ever there in the first form.

First all is checked, and what has to be converted or cut packed. The other weights, most of them or all, are left to
the backend, if it can read them by itself, in one call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from worker.kernels import (
    Kernels,
    PacksStored,
    PreparedLinear,
    QuantizedWeight,
    StoredError,
    StoredPart,
    WeightSpec,
)
from worker.kernels.interface import PACK_ROWS
from worker.kernels.quantized import Format, quantize
from worker.model.checkpoint import DTYPES, Checkpoint, StoredTensor, cast, unreadable
from worker.model.config import ModelConfig
from worker.model.errors import ModelError
from worker.model.layers import Head, Matrix, Part, RMSNorm
from worker.model.plan import MERGED, Shard, check_shares, stage_of, style_of
from worker.model.quantization import cut_columns, find_stored, format_of, join_rows, resolve_quantization
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
    on_reading: Callable[[], None] = lambda: None,
) -> CausalLM:
    """Builds the model and loads its weights: this rank's share of them.

    Args:
        dtype: what weights are kept in that are not quantized.
        shard: which share; that of `group` if None.
        group: the ranks that run the model together; loading needs no connection between them.
        quantize: what the weights of a checkpoint that is not quantized are quantized to.
        on_reading: called when nothing is left but to have the backend read, which leaves Python to other threads. Not
            called where there is nothing to read, or something is wrong.

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
        loader.read(on_reading)
    return model


def _ignorable(name: str, config: ModelConfig) -> bool:
    # A tied checkpoint may still store the head, as a copy of the embedding.
    return (config.tie_word_embeddings and name == "lm_head.weight") or _IGNORED.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class _Unread:
    """Rows `start` to `stop` of a weight that the backend can read by itself."""

    tensors: list[StoredTensor]
    start: int
    stop: int
    read: Callable[[], Tensor | QuantizedWeight]
    """For what has to be joined with other rows after all."""


Piece = Tensor | QuantizedWeight | _Unread


@dataclass(frozen=True, slots=True)
class _Loader:
    checkpoint: Checkpoint
    config: ModelConfig
    kernels: Kernels
    dtype: torch.dtype
    shard: Shard
    quantization: str
    unread: list[tuple[_Unread, StoredPart]] = field(default_factory=list)
    """What is left for the backend to read, by `read`."""

    def read(self, on_reading: Callable[[], None]) -> None:
        """Has the backend read what was left to it. Raises ModelError."""
        if not self.unread or not isinstance(self.kernels, PacksStored):
            return
        on_reading()
        try:
            self.kernels.pack_stored([part for _, part in self.unread])
        except StoredError as error:
            raise unreadable(self.unread[error.part][0].tensors[error.place], error.reason) from error

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
        left: list[tuple[int, _Unread]] = []
        for first, piece in _aligned(p for part in parts for p in self._pieces(*part, quantized)):
            if isinstance(piece, _Unread):
                left.append((first, piece))
            else:
                packer.put(first, piece)
        bias = None
        if layer.parts[0].bias:
            stored = zip(sources, layer.parts, cuts, strict=True)
            bias = torch.cat([self._bias(f"{source}.bias", part.shape[:1], cut[0]) for source, part, cut in stored])
            if style_of(name) == "rowwise" and self.shard.rank:
                # Row-parallel outputs are summed over ranks: one of them brings the bias.
                bias.zero_()
        prepared = packer.finish(bias)
        for first, piece in left:
            places = tuple(self.checkpoint.place(stored, piece.start) for stored in piece.tensors)
            dtype = DTYPES[piece.tensors[0].dtype]
            self.unread.append((piece, StoredPart(prepared, first, piece.stop - piece.start, dtype, places)))
        return prepared

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
    ) -> Iterator[Piece]:
        """This rank's rows of one stored weight, some at a time, and zeros up to `count` of them."""
        rows, columns = cut
        name, shape = f"{source}.weight", part.shape
        stored_as = format if self.config.quantization != "none" else None
        if stored_as is None:
            tensors = [self.checkpoint.find(name, shape)]
        else:
            tensors = find_stored(self.checkpoint, source, (shape[0], shape[1]), stored_as)

        def read(start: int, stop: int) -> Tensor | QuantizedWeight:
            found = [self.checkpoint.rows(stored, start, stop) for stored in tensors]
            if format is None:
                return cast(found[0][:, columns], self.dtype, tensors[0])
            # Whole rows, so that ranks see the groups and scales that one of them alone would.
            whole = quantize(found[0], format) if stored_as is None else QuantizedWeight(format, shape[1], *found)
            return cut_columns(whole, columns.start, columns.stop, name)

        kept_as_stored = stored_as is not None if format else DTYPES[tensors[0].dtype] == self.dtype
        left = isinstance(self.kernels, PacksStored) and kept_as_stored and columns == slice(0, shape[1])
        at_once = _rows_at_once(shape[1])
        for start in range(rows.start, rows.stop, at_once):
            stop = min(start + at_once, rows.stop)
            yield _Unread(tensors, start, stop, partial(read, start, stop)) if left else read(start, stop)
        padding = count - (rows.stop - rows.start)
        if padding:
            zeros = torch.zeros(padding, columns.stop - columns.start, dtype=self.dtype)
            yield zeros if format is None else quantize(zeros, format)


def _rows_at_once(columns: int) -> int:
    return max(1, PIECE_WEIGHTS // columns // PACK_ROWS) * PACK_ROWS


def _aligned(pieces: Iterator[Piece]) -> Iterator[tuple[int, Piece]]:
    """The same rows, each piece with the number of its first; all but the last hold a multiple of `PACK_ROWS`."""
    held: list[Piece] = []
    first = count = 0
    for piece in pieces:
        held.append(piece)
        count += _count(piece)
        if count % PACK_ROWS == 0:
            yield first, _joined(held)
            held, first = [], count
    if held:
        yield first, _joined(held)


def _count(piece: Piece) -> int:
    match piece:
        case _Unread():
            return piece.stop - piece.start
        case QuantizedWeight():
            return piece.out_features
        case _:
            return piece.shape[0]


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    return join_rows([piece.read() if isinstance(piece, _Unread) else piece for piece in pieces])


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
