"""Paged attention whose bits do not depend on the batch.

Invariant: a query's result is a fixed sequence of operations, chosen by absolute positions alone. Keys come in tiles of
256 positions, each with a softmax of its own; tiles are merged in order by their peaks and sums (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018). A tile with no position that a query may read leaves its
result untouched, bit for bit, so it does not matter whether it is visited.

Products are [rows, D] x [D, 256] and [rows, 256] x [256, D], their rows being queries of the heads that share keys. How
many rows a product has must not show in any row's bits: `same_bits` tests what is used. MKL's products have the same
bits from 4 rows a thread upwards, not below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.kernels.interface import KVCache, RaggedBatch

KV_TILE = 256
QUERY_TILE = 64
"""A chunk's queries are padded with zeros to tiles of this many positions, aligned to p // 64."""
PREFILL_QUERIES = (QUERY_TILE, 16, 4)
"""How many positions one product of a prefill may hold: the first that keeps all bits does. The last one defines them
and is always allowed."""

# Added to scores that a query may not see: far below any that a float32 model produces, so that their weights are 0.
# Finite, so that where a query sees nothing of a tile its result there is finite, and weighs 0 against any other tile.
_NO_SCORE = -3.0e38


@dataclass(frozen=True, slots=True)
class _Tile:
    """One KV tile for the queries that reach it."""

    first: int
    """First query tile (of a chunk) that reaches it; 0 in decode."""
    count: int
    """Sequences (in decode, the longest ones) or query tiles (of a chunk) that reach it."""
    gather: Tensor
    """Rows of the cache seen as [K * blocks, block size * D], int64: sequence by sequence, head by head. Where a
    sequence has no more blocks its first one stands in."""
    hidden: dict[int | None, Tensor | None]
    """Per window, to be added to scores: `_NO_SCORE` where a query may not read. None if it may read all; no entry if
    no query reads anything."""
    unwritten: Tensor | None
    """Rows of what is gathered, seen as [sequences * K * 256, D], that their sequence has not written, int64: what lies
    there belongs to others and may even be NaN."""


@dataclass(frozen=True, slots=True)
class _Decode:
    """All chunks of one token, longest first, so that the sequences that reach a KV tile are a prefix."""

    rows: Tensor
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
    end = int(batch.starts[sequence] + batch.lengths[sequence])
    known = batch.block_tables[sequence][: -(-end // batch.block_size)]
    table = np.full(tiles * per_tile, known[0], np.int64)
    table[: len(known)] = known
    return table.reshape(tiles, per_tile)


def _unwritten(
    ends: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], block_size: int, kv_heads: int
) -> Tensor | None:
    """`_Tile.unwritten` for sequences that have written the positions below `ends`; `keys` are the tile's."""
    has_block = keys < -(-ends[:, None] // block_size) * block_size
    source = np.where(has_block, keys, keys % block_size)
    rows = np.flatnonzero(np.repeat(source >= ends[:, None], kv_heads, axis=0))
    return torch.from_numpy(rows) if len(rows) else None


def _hidden(
    queries: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], windows: Sequence[int | None]
) -> dict[int | None, npt.NDArray[np.bool_]]:
    """Per window, [queries, keys]: True where a query may not read a key; windows that read nothing are left out."""
    distance = queries[:, None] - keys[None, :]
    masks = {window: (distance < 0) | (distance >= (window or np.inf)) for window in windows}
    return {window: mask for window, mask in masks.items() if not mask.all()}


def _penalty(mask: npt.NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.where(mask, np.float32(_NO_SCORE), np.float32(0.0)))


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
        tiles.append(
            _Tile(
                first=0,
                count=count,
                gather=torch.from_numpy((heads + tables[:count, index, None, :]).reshape(-1)),
                hidden={
                    window: _penalty(mask[:, None, None, :]) if mask.any() else None
                    for window, mask in _hidden(positions[:count], keys, windows).items()
                },
                unwritten=_unwritten(positions[:count] + 1, keys, batch.block_size, kv_heads),
            )
        )
    return _Decode(torch.from_numpy(rows[order]), tuple(tiles))


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
            masked = np.flatnonzero(mask.any(axis=1))
            reach = int(masked[-1]) // QUERY_TILE + 1 if len(masked) else 0
            shape = (reach, QUERY_TILE, 1, KV_TILE)
            hidden[window] = _penalty(mask[: reach * QUERY_TILE].reshape(shape)) if reach else None
        gather = torch.from_numpy((heads + blocks).reshape(-1))
        unwritten = _unwritten(np.array([end]), keys, batch.block_size, kv_heads)
        tiles.append(_Tile(first, query_tiles - first, gather, hidden, unwritten))
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


_tested: dict[tuple[int, int, int, int, int], bool] = {}


def same_bits(rows: int, items: int, group: int, head_dim: int) -> bool:
    """Whether `items` products of `rows` rows in one call give every row the bits that it has among many products of
    the last of `PREFILL_QUERIES`.

    Tested the first time that the shape and number of threads come up; nothing else can make a library choose another
    order of additions. Where there are fewer products than threads it may cut single ones, so their number counts.
    """
    threads = torch.get_num_threads()
    key = (rows, min(items, 2 * threads), group, head_dim, threads)
    if key not in _tested:
        _tested[key] = _test(*key)
    return _tested[key]


def _test(rows: int, items: int, group: int, head_dim: int, threads: int) -> bool:
    """Keys and values are laid out as in `_prefill`, where products share them, and as in `_decode`."""
    generator = torch.Generator().manual_seed(rows)
    canonical, many = PREFILL_QUERIES[-1] * group, 2 * threads
    keys, values = (torch.randn(many, KV_TILE, head_dim, generator=generator) for _ in range(2))
    for inner, own in ((head_dim, keys.transpose(1, 2)), (KV_TILE, values)):
        left = torch.randn(many, rows, inner, generator=generator)
        padded = torch.constant_pad_nd(left, (0, 0, 0, -rows % canonical))
        for right in (own, own[:1].expand(own.shape)):
            wanted = torch.cat([torch.bmm(part, right) for part in torch.split(padded, canonical, dim=1)], dim=1)
            if not torch.equal(torch.bmm(left[:items], right[:items]), wanted[:items, :rows]):
                return False
    return True


def _products(left: Tensor, right: Tensor, group: int, head_dim: int) -> Tensor:
    """[K, n * G, inner] @ [K, inner, outer], n a multiple of `QUERY_TILE`, in as few products as keep all bits."""
    kv_heads, total, inner = left.shape
    outer = right.shape[2]
    heights = [queries * group for queries in PREFILL_QUERIES]
    rows = next((rows for rows in heights if same_bits(rows, total // rows, group, head_dim)), heights[-1])
    items = total // rows
    out = torch.empty(kv_heads, items, rows, outer)
    for head in range(kv_heads):
        # A head's keys or values are shared by its products through a stride of 0.
        torch.bmm(left[head].view(items, rows, inner), right[head].expand(items, inner, outer), out=out[head])
    return out.view(kv_heads, total, outer)


@dataclass(frozen=True, slots=True)
class _State:
    """Attention of queries [..., rows, D] over some tiles, updated in place."""

    peak: Tensor
    """The largest score, [..., rows, 1]."""
    total: Tensor
    """The sum of exp(score - peak), [..., rows, 1]."""
    mixed: Tensor
    """The values' mean by softmax, [..., rows, D]."""

    @classmethod
    def of(cls, scores: Tensor, mix: Callable[[Tensor], Tensor]) -> _State:
        """Over one tile: scores [..., rows, 256]; `mix` takes weights to weighted sums of values."""
        weights = torch.softmax(scores, -1)
        # The largest weight is that of the peak itself, 1 / total.
        return cls(scores.amax(-1, keepdim=True), weights.amax(-1, keepdim=True).reciprocal_(), mix(weights))

    def part(self, *index: slice) -> _State:
        """A view of some queries' state."""
        return _State(self.peak[index], self.total[index], self.mixed[index])

    def merge(self, later: _State) -> None:
        """Takes in a later tile. Where either has seen nothing (`_NO_SCORE`) its share is exactly 0, the other's 1."""
        peak = torch.maximum(self.peak, later.peak)
        own, other = self.total * (self.peak - peak).exp_(), later.total * (later.peak - peak).exp_()
        total = own + other
        self.mixed.mul_(own / total).add_(later.mixed * (other / total))
        self.peak.copy_(peak)
        self.total.copy_(total)


def _over_tiles(
    tiles: Sequence[_Tile],
    scores_of: Callable[[_Tile], Tensor],
    mix: Callable[[_Tile, Tensor], Tensor],
    reach: Callable[[_Tile], tuple[slice, ...]],
) -> Tensor:
    """Attention over the tiles that any query reads. All queries reach the first of them, since each reads its own
    position; `reach` names those that reach another."""
    first, *later = tiles
    if not later:
        # What merging with tiles that a query does not read would leave as it is.
        mixed = mix(first, torch.softmax(scores_of(first), -1))
    else:
        state = _State.of(scores_of(first), partial(mix, first))
        for tile in later:
            state.part(*reach(tile)).merge(_State.of(scores_of(tile), partial(mix, tile)))
        mixed = state.mixed
    return mixed.add_(0.0)  # a zero comes out positive, whether it was merged or not


def _gather(pool: Tensor, scales: Tensor | None, tile: _Tile) -> Tensor:
    """A tile's keys or values in float32, [sequences * K, 256, D]; zeros where nothing is written, since neither a
    penalty nor a weight of 0 silences a not-a-number."""
    kv_heads, num_blocks, block_size, head_dim = pool.shape
    blocks = pool.view(kv_heads * num_blocks, block_size * head_dim).index_select(0, tile.gather)
    rows = blocks.view(-1, head_dim).to(torch.float32)
    if scales is not None:
        rows.mul_(scales.view(kv_heads * num_blocks, block_size).index_select(0, tile.gather).view(-1, 1))
    if tile.unwritten is not None:
        rows.index_fill_(0, tile.unwritten, 0.0)
    return rows.view(-1, KV_TILE, head_dim)


@cache
def _repeated(width: int, group: int) -> Tensor:
    """Which of a group's heads each of a product's rows is."""
    return torch.arange(width) % group


def _decode(grouped: Tensor, cache: KVCache, plan: _Decode, window: int | None, out: Tensor) -> None:
    """One query per sequence, all sequences at once. A group's heads are repeated to fill their product's rows."""
    _, kv_heads, group, head_dim = grouped.shape
    batch = plan.rows.shape[0]
    key_scales, value_scales = cache.scales or (None, None)
    tiles = [tile for tile in plan.tiles if window in tile.hidden]
    counts = {tile.count * kv_heads for tile in tiles}
    least = -(-group // 4) * 4
    allowed = (least, 2 * least, 4 * least)
    width = next((n for n in allowed if all(same_bits(n, items, group, head_dim) for items in counts)), allowed[-1])
    scaled = grouped.index_select(0, plan.rows).to(torch.float32) * head_dim**-0.5
    queries = scaled.view(batch * kv_heads, group, head_dim).index_select(1, _repeated(width, group))

    def scores_of(tile: _Tile) -> Tensor:
        scores = torch.bmm(queries[: tile.count * kv_heads], _gather(cache.keys, key_scales, tile).transpose(1, 2))
        hidden = tile.hidden[window]
        if hidden is not None:
            scores.view(tile.count, kv_heads, width, KV_TILE).add_(hidden)
        return scores

    def mix(tile: _Tile, weights: Tensor) -> Tensor:
        return torch.bmm(weights, _gather(cache.values, value_scales, tile))

    def reach(tile: _Tile) -> tuple[slice, ...]:
        return (slice(0, tile.count * kv_heads),)

    result = _over_tiles(tiles, scores_of, mix, reach)[:, :group]
    out.index_copy_(0, plan.rows, result.view(batch, kv_heads, group, head_dim).to(out.dtype))


def _prefill(grouped: Tensor, cache: KVCache, chunk: _Chunk, window: int | None, out: Tensor) -> None:
    """Many queries of one sequence."""
    _, kv_heads, group, head_dim = grouped.shape
    rows = slice(chunk.row, chunk.row + chunk.length)
    key_scales, value_scales = cache.scales or (None, None)
    width = QUERY_TILE * group
    tiled = torch.zeros(kv_heads, chunk.query_tiles * QUERY_TILE, group, head_dim)
    inner = slice(chunk.lead, chunk.lead + chunk.length)
    tiled[:, inner] = grouped[rows].to(torch.float32).transpose(0, 1) * head_dim**-0.5
    queries = tiled.view(kv_heads, chunk.query_tiles * width, head_dim)

    def scores_of(tile: _Tile) -> Tensor:
        scores = _products(
            queries[:, tile.first * width :], _gather(cache.keys, key_scales, tile).transpose(1, 2), group, head_dim
        )
        hidden = tile.hidden[window]
        if hidden is not None:
            reach = hidden.shape[0]
            masked = scores[:, : reach * width].view(kv_heads, reach, QUERY_TILE, group, KV_TILE)
            masked.add_(hidden)
        return scores

    def mix(tile: _Tile, weights: Tensor) -> Tensor:
        return _products(weights, _gather(cache.values, value_scales, tile), group, head_dim)

    def reach(tile: _Tile) -> tuple[slice, ...]:
        return slice(None), slice(tile.first * width, None)

    tiles = [tile for tile in chunk.tiles if window in tile.hidden]
    result = _over_tiles(tiles, scores_of, mix, reach).view(kv_heads, -1, group, head_dim)
    out[rows] = result[:, inner].transpose(0, 1).to(out.dtype)
