"""Paged attention whose bits do not depend on the batch.

Invariant: a query's result is a fixed sequence of operations on operands of fixed shape, chosen by absolute positions
alone. Keys come in tiles of 256 positions, merged in order with a running maximum and sum (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018). Queries come in tiles of 4 positions (p // 4), padded with zeros, so
that each product is [4G, D] x [D, 256] and [4G, 256] x [256, D] for a GQA group of G heads, whether the query was
decoded alone or was part of a prompt. A tile with no position that a query may read leaves its state untouched, bit for
bit, so it does not matter whether it is visited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.kernels.interface import KVCache, RaggedBatch

KV_TILE = 256
QUERY_TILE = 4

# Finite, so that a row that has seen no key yet stays free of inf - inf; below any score that a float32 model produces.
_NO_SCORE = -3.0e38


@dataclass(frozen=True, slots=True)
class _Tile:
    """One KV tile for the queries that reach it."""

    first: int
    """First query tile (of a chunk) that reaches it; 0 in decode."""
    count: int
    """Sequences (in decode, the longest ones) or query tiles (of a chunk) that reach it."""
    gather: Tensor
    """Rows of the cache seen as [K * blocks, block size * D], int64: sequence by sequence, head by head."""
    hidden: dict[int | None, Tensor | None]
    """Per window: True where a query may not read, None if it may read all; no entry if no query reads anything."""
    past_end: Tensor | None
    """True at positions not yet written: what lies there belongs to others and may even be NaN."""


@dataclass(frozen=True, slots=True)
class _Decode:
    """All chunks of one token, longest first, so that the sequences that reach a KV tile are a prefix."""

    rows: Tensor
    offsets: Tensor
    """Position % QUERY_TILE."""
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One chunk of several tokens: its rows, the zero rows that align it to a query tile, and its KV tiles."""

    row: int
    length: int
    lead: int
    query_tiles: int
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """A step's attention, shared by all layers."""

    decode: _Decode | None
    chunks: tuple[_Chunk, ...]


def plan_attention(batch: RaggedBatch, kv_heads: int, windows: Sequence[int | None]) -> ReferencePlan:
    """See `Kernels.plan_attention`. Raises ValueError for a block size that does not divide a KV tile."""
    if KV_TILE % batch.block_size:
        raise ValueError(f"block_size must divide {KV_TILE}, got {batch.block_size}")
    rows = np.cumsum(batch.lengths) - batch.lengths
    single = np.flatnonzero(batch.lengths == 1)
    decode = _plan_decode(batch, single, rows, kv_heads, windows) if len(single) else None
    chunks = tuple(
        _plan_chunk(batch, index, int(rows[index]), kv_heads, windows)
        for index in np.flatnonzero(batch.lengths > 1).tolist()
    )
    return ReferencePlan(decode, chunks)


def _padded_table(batch: RaggedBatch, sequence: int, tiles: int) -> npt.NDArray[np.int64]:
    per_tile = KV_TILE // batch.block_size
    table = np.zeros(tiles * per_tile, np.int64)
    known = batch.block_tables[sequence][: len(table)]
    table[: len(known)] = known
    return table.reshape(tiles, per_tile)


def _hidden(
    queries: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], windows: Sequence[int | None]
) -> dict[int | None, npt.NDArray[np.bool_]]:
    """Per window, [queries, keys]: True where a query may not read a key; windows that read nothing are left out."""
    distance = queries[:, None] - keys[None, :]
    masks = {window: (distance < 0) | (distance >= (window or np.inf)) for window in windows}
    return {window: mask for window, mask in masks.items() if not mask.all()}


def _plan_decode(
    batch: RaggedBatch,
    single: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    kv_heads: int,
    windows: Sequence[int | None],
) -> _Decode:
    order = single[np.argsort(-batch.starts[single], kind="stable")]
    positions = batch.starts[order]
    total = int(positions[0]) // KV_TILE + 1
    tables = np.stack([_padded_table(batch, int(sequence), total) for sequence in order])
    heads = np.arange(kv_heads)[:, None] * batch.num_blocks
    tiles = []
    for index in range(total):
        keys = np.arange(index * KV_TILE, (index + 1) * KV_TILE)
        count = int(np.count_nonzero(positions >= keys[0]))
        past_end = keys[None, :] > positions[:count, None]
        tiles.append(
            _Tile(
                first=0,
                count=count,
                gather=torch.from_numpy((heads + tables[:count, index, None, :]).reshape(-1)),
                hidden={
                    window: torch.from_numpy(mask[:, None, None, :]) if mask.any() else None
                    for window, mask in _hidden(positions[:count], keys, windows).items()
                },
                past_end=torch.from_numpy(past_end[:, None, :, None]) if past_end.any() else None,
            )
        )
    return _Decode(torch.from_numpy(rows[order]), torch.from_numpy(positions % QUERY_TILE), tuple(tiles))


def _plan_chunk(batch: RaggedBatch, index: int, row: int, kv_heads: int, windows: Sequence[int | None]) -> _Chunk:
    start, length = int(batch.starts[index]), int(batch.lengths[index])
    end = start + length
    base = start - start % QUERY_TILE
    query_tiles = -(-(end - base) // QUERY_TILE)
    queries = np.arange(base, base + query_tiles * QUERY_TILE)
    table = _padded_table(batch, index, (end - 1) // KV_TILE + 1)
    heads = np.arange(kv_heads)[:, None] * batch.num_blocks
    tiles = []
    for tile, blocks in enumerate(table):
        keys = np.arange(tile * KV_TILE, (tile + 1) * KV_TILE)
        first = max(0, int(keys[0]) - base) // QUERY_TILE
        hidden: dict[int | None, Tensor | None] = {}
        for window, mask in _hidden(queries[first * QUERY_TILE :], keys, windows).items():
            # Most query tiles of a long chunk read the whole KV tile: the mask ends at the last one that does not.
            partial = np.flatnonzero(mask.any(axis=1))
            reach = int(partial[-1]) // QUERY_TILE + 1 if len(partial) else 0
            shape = (reach, QUERY_TILE, 1, KV_TILE)
            hidden[window] = torch.from_numpy(mask[: reach * QUERY_TILE].reshape(shape)) if reach else None
        past_end = torch.from_numpy(keys >= end)[:, None] if keys[-1] >= end else None
        tiles.append(
            _Tile(first, query_tiles - first, torch.from_numpy((heads + blocks).reshape(-1)), hidden, past_end)
        )
    return _Chunk(row, length, start - base, query_tiles, tuple(tiles))


def paged_attention(queries: Tensor, cache: KVCache, plan: ReferencePlan, window: int | None) -> Tensor:
    """See `Kernels.paged_attention`."""
    rows, q_heads, head_dim = queries.shape
    kv_heads = cache.keys.shape[0]
    grouped = queries.view(rows, kv_heads, q_heads // kv_heads, head_dim)
    out = torch.zeros_like(grouped)
    if plan.decode is not None:
        _decode(grouped, cache, plan.decode, window, out)
    for chunk in plan.chunks:
        _prefill(grouped, cache, chunk, window, out)
    return out.view(rows, q_heads * head_dim)


@dataclass(frozen=True, slots=True)
class _State:
    """Running softmax of queries [..., 4G, D], updated in place."""

    peak: Tensor
    """The largest score so far, [..., 4G, 1]."""
    total: Tensor
    """The sum of weights relative to `peak`, [..., 4G, 1]."""
    mixed: Tensor
    """The weighted sum of values, [..., 4G, D]."""

    @classmethod
    def start(cls, queries: Tensor) -> _State:
        peak = queries.new_full((*queries.shape[:-1], 1), _NO_SCORE)
        return cls(peak, torch.zeros_like(peak), torch.zeros_like(queries))

    def part(self, *index: slice) -> _State:
        """A view of some queries' state."""
        return _State(self.peak[index], self.total[index], self.mixed[index])

    def weigh(self, scores: Tensor) -> Tensor:
        """Takes in scores [..., 4G, 256] (overwritten) and returns their weights, for the caller to add to `mixed`."""
        peak = torch.maximum(self.peak, scores.amax(-1, keepdim=True))
        weights = scores.sub_(peak).exp_()
        fade = (self.peak - peak).exp_()
        self.total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        self.mixed.mul_(fade)
        self.peak.copy_(peak)
        return weights

    def result(self) -> Tensor:
        return self.mixed / self.total


def _gather(pool: Tensor, tile: _Tile, past_end: Tensor | None = None) -> Tensor:
    """A tile's keys or values in float32, [sequences * K, 256, D]."""
    kv_heads, num_blocks, block_size, head_dim = pool.shape
    blocks = pool.view(kv_heads * num_blocks, block_size * head_dim).index_select(0, tile.gather)
    gathered = blocks.view(-1, kv_heads, KV_TILE, head_dim).to(torch.float32)
    if past_end is not None:
        gathered.masked_fill_(past_end, 0.0)
    return gathered.view(-1, KV_TILE, head_dim)


def _decode(grouped: Tensor, cache: KVCache, plan: _Decode, window: int | None, out: Tensor) -> None:
    """One query per sequence, all sequences at once."""
    _, kv_heads, group, head_dim = grouped.shape
    batch = plan.rows.shape[0]
    sequences = torch.arange(batch)
    tiled = torch.zeros(batch, kv_heads, QUERY_TILE, group, head_dim)
    tiled[sequences, :, plan.offsets] = grouped[plan.rows].to(torch.float32) * head_dim**-0.5
    queries = tiled.view(batch * kv_heads, QUERY_TILE * group, head_dim)
    state = _State.start(queries.view(batch, kv_heads, QUERY_TILE * group, head_dim))
    for tile in plan.tiles:
        if window not in tile.hidden:
            continue
        items = tile.count * kv_heads
        scores = torch.bmm(queries[:items], _gather(cache.keys, tile).transpose(1, 2))
        scores = scores.view(tile.count, kv_heads, QUERY_TILE * group, KV_TILE)
        hidden = tile.hidden[window]
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        reached = state.part(slice(0, tile.count))
        weights = reached.weigh(scores).view(items, QUERY_TILE * group, KV_TILE)
        mixed = torch.bmm(weights, _gather(cache.values, tile, tile.past_end))
        reached.mixed.add_(mixed.view(reached.mixed.shape))
    result = state.result().view(batch, kv_heads, QUERY_TILE, group, head_dim)
    out[plan.rows] = result[sequences, :, plan.offsets].to(out.dtype)


def _prefill(grouped: Tensor, cache: KVCache, chunk: _Chunk, window: int | None, out: Tensor) -> None:
    """Many queries of one sequence: each head's keys are shared by its query tiles through a stride of 0."""
    _, kv_heads, group, head_dim = grouped.shape
    rows = slice(chunk.row, chunk.row + chunk.length)
    width = QUERY_TILE * group
    tiled = torch.zeros(kv_heads, chunk.query_tiles * QUERY_TILE, group, head_dim)
    inner = slice(chunk.lead, chunk.lead + chunk.length)
    tiled[:, inner] = grouped[rows].to(torch.float32).transpose(0, 1) * head_dim**-0.5
    queries = tiled.view(kv_heads, chunk.query_tiles, width, head_dim)
    state = _State.start(queries)
    for tile in chunk.tiles:
        if window not in tile.hidden:
            continue
        keys, values = _gather(cache.keys, tile), _gather(cache.values, tile, tile.past_end)
        scores = torch.empty(kv_heads, tile.count, width, KV_TILE)
        for head in range(kv_heads):
            shared = keys[head].t().expand(tile.count, head_dim, KV_TILE)
            torch.bmm(queries[head, tile.first :], shared, out=scores[head])
        hidden = tile.hidden[window]
        if hidden is not None:
            reach = hidden.shape[0]
            masked = scores[:, :reach].view(kv_heads, reach, QUERY_TILE, group, KV_TILE)
            masked.masked_fill_(hidden, -torch.inf)
        reached = state.part(slice(None), slice(tile.first, None))
        weights = reached.weigh(scores)
        for head in range(kv_heads):
            reached.mixed[head].add_(torch.bmm(weights[head], values[head].expand(tile.count, KV_TILE, head_dim)))
    result = state.result().view(kv_heads, chunk.query_tiles * QUERY_TILE, group, head_dim)
    out[rows] = result[:, inner].transpose(0, 1).to(out.dtype)
