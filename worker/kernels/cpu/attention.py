"""Paged attention: checks and addresses for `native/attention.h`, which says how it works."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.kernels.interface import KVCache, RaggedBatch

KV_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.int16: 4}
"""The types a cache may have, by their number in native/attention_types.h."""

MAX_HEAD_DIM = 1024


def cache_addresses(cache: KVCache) -> tuple[int, int, int, int, int]:
    """Of keys, values and their scales, 0 where they have none, and the number of their type. Raises ValueError."""
    keys, values, *scales = cache.tensors
    if not keys.dtype.is_floating_point and not scales:
        raise ValueError("a cache of codes needs scales")
    key_scales, value_scales = (scale.data_ptr() for scale in scales) if scales else (0, 0)
    return keys.data_ptr(), values.data_ptr(), key_scales, value_scales, KV_TYPES[keys.dtype]


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """A step's chunks, for every layer and window. Arrays are int64, contiguous and alive as long as the plan."""

    rows: int
    """Rows that the chunks take up; a step's other rows are dummies."""
    arrays: tuple[npt.NDArray[np.int64], ...]
    """starts, lengths, block tables end to end, where each chunk's table begins."""
    addresses: tuple[int, int, int, int]
    chunks: int

    @classmethod
    def over(cls, rows: int, arrays: tuple[npt.NDArray[np.int64], ...], chunks: int) -> CpuPlan:
        """Of arrays that `chunk_arrays` made, or that have room for what it makes."""
        starts, lengths, tables, table_starts = arrays
        addresses = (starts.ctypes.data, lengths.ctypes.data, tables.ctypes.data, table_starts.ctypes.data)
        return cls(rows, arrays, addresses, chunks)


def chunk_arrays(batch: RaggedBatch) -> tuple[npt.NDArray[np.int64], ...]:
    """Starts, lengths, block tables end to end, and where each chunk's table begins."""
    tables = batch.block_tables
    sizes = np.fromiter(map(len, tables), np.int64, len(tables))
    joined = np.concatenate(tables) if len(tables) > 1 else tables[0]
    return batch.starts, batch.lengths, joined, np.cumsum(sizes) - sizes


def plan_attention(batch: RaggedBatch) -> CpuPlan:
    """See `Kernels.plan_attention`. Raises ValueError for a block size that is no power of two up to 256."""
    if batch.block_size not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        raise ValueError(f"block_size must be a power of two up to 256, got {batch.block_size}")
    arrays = tuple(np.ascontiguousarray(array, np.int64) for array in chunk_arrays(batch))
    return CpuPlan.over(int(batch.lengths.sum()), arrays, len(batch.lengths))


def paged_attention(
    native: ModuleType,
    queries: Tensor,
    cache: KVCache,
    plan: CpuPlan,
    window: int | None,
    out: Tensor | None = None,
) -> Tensor:
    """See `Kernels.paged_attention`. float32 [T, Q, D], rows at any stride, to `out` [T, Q * D], contiguous.

    The plan's blocks must lie in the cache, which isn't checked again here.
    """
    rows, q_heads, head_dim = queries.shape
    kv_heads, blocks, block_size, cache_dim = cache.keys.shape
    stride, head_stride, element_stride = queries.stride()
    if queries.dtype != torch.float32 or head_stride != head_dim or element_stride != 1:
        raise ValueError("queries: expected float32 with contiguous heads")
    if head_dim != cache_dim or head_dim % 16 or head_dim > MAX_HEAD_DIM or q_heads % kv_heads:
        raise ValueError(f"can't attend with {q_heads} heads of {head_dim} to {kv_heads} of {cache_dim}")
    if plan.rows > rows:
        raise ValueError(f"the plan has {plan.rows} rows, the queries {rows}")
    if out is None:
        out = torch.empty(rows, q_heads * head_dim)
    elif out.shape != (rows, q_heads * head_dim) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError("out: expected contiguous float32 [T, Q * D]")
    if plan.rows < rows:
        out[plan.rows :] = 0.0
    starts, lengths, tables, table_starts = plan.addresses
    native.paged_attention(
        queries.data_ptr(),
        stride,
        q_heads,
        *cache_addresses(cache),
        kv_heads,
        blocks,
        block_size,
        head_dim,
        starts,
        lengths,
        tables,
        table_starts,
        plan.chunks,
        window or 0,
        out.data_ptr(),
    )
    return out
