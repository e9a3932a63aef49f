"""What a backend computes, in which layout. Letters in shapes:

    T  rows of the step: its tokens, and behind them dummy rows where a captured graph has more
    S  rows to draw from        V  vocabulary       H  hidden size      D  head size
    Q  query heads              K  key/value heads; Q is a multiple of K, query head q reads key/value head q // (Q / K)

The promise of a backend that is `batch_invariant`: a row's bits depend on that row alone (and, in attention, on the
keys and values of its own sequence), never on which rows share the call, on their number, on how a prompt was cut into
chunks, on the block size or on the number of threads. All backends on CPUs are, and cuda in a mode of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.kernels.names import Format
from worker.kernels.quantized import QuantizedWeight

PACK_ROWS = 32
"""Packers take rows in multiples of this."""

PreparedLinear: TypeAlias = Any
"""A weight in the backend's own layout, from a `Packer`; opaque to callers."""

AttentionPlan: TypeAlias = Any
"""A step's gather indexes, tiles and masks, from `Kernels.plan_attention`; opaque to callers."""


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's keys and values, each [K, blocks, block size, D], contiguous; of a dtype of their own.

    Position p of a sequence lies in block `table[p // block_size]` at offset `p % block_size`.
    """

    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, Tensor] | None = field(default=None, kw_only=True)
    """The keys' and the values', float32 [K, blocks, block size], where these are codes: a vector's largest element has
    the greatest code, and an element is its code times its vector's scale. Caches of int8, int16 and fp8 have them."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them; the second dimension is the block."""
        return (self.keys, self.values, *(self.scales or ()))


GREATEST_CODES = {torch.int8: 127, torch.int16: 8191}
"""Of caches of whole numbers."""


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Which positions of which sequences a step computes. The step's rows are the chunks' tokens, one after another."""

    starts: npt.NDArray[np.int64]
    """Position of each chunk's first token, [chunks]."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each chunk, at least 1, [chunks]."""
    block_tables: Sequence[npt.NDArray[np.int64]]
    """Block ids of each chunk's sequence, in order, covering the chunk's last position."""
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each of S rows is drawn. Everything is [S]; see `Kernels.sample`."""

    temperature: npt.NDArray[np.float32]
    """0 is greedy."""
    top_k: npt.NDArray[np.int64]
    """0 keeps all."""
    top_p: npt.NDArray[np.float64]
    """In (0, 1]."""
    min_p: npt.NDArray[np.float64]
    """In [0, 1)."""
    seed: npt.NDArray[np.uint64]
    choice: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Entries:
    """Single logits: entry i is logits[rows[i], ids[i]]; no pair comes up twice. Arrays of one length."""

    rows: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Changes to logits before a draw, in the order in which they are made."""

    repeated: Entries
    """Divided by the value if positive, else multiplied by it (repetition penalty, Keskar et al. 2019)."""
    added: Entries
    """The value is added (frequency and presence penalty, bias)."""
    allowed: Mapping[int, npt.NDArray[np.int64]]
    """By row: all other ids become -inf."""
    masks: Mapping[int, npt.NDArray[np.bool_]]
    """By row, [V]: ids where it is False become -inf."""
    banned: Entries
    """Become -inf; the values don't matter."""


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A weight [out, in] that is about to be loaded, and what it is for."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    """What weights are kept in unless they are quantized."""
    quantized: Format | None = None
    multiplied: bool = True
    """Whether `linear` will be called with it."""
    looked_up: bool = False
    """Whether `embed` will be."""


class Packer(Protocol):
    """Takes over a weight piece by piece, so that no second copy of it is ever whole in memory."""

    def put(self, row: int, rows: Tensor | QuantizedWeight) -> None:
        """The weight's rows from `row` on, a multiple of `PACK_ROWS`; all pieces but the last hold a multiple, too.

        Rows come once each, in rising order, stored as the spec says. They may be overwritten afterwards.
        """
        ...

    def finish(self, bias: Tensor | None) -> PreparedLinear:
        """The whole weight, with its `bias` [out]; once all rows are there."""
        ...


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Rows of a weight that lie in files just as its packer would be given them: whole rows, one behind the other."""

    prepared: PreparedLinear
    """The weight, from its packer's `finish`."""
    first_row: int
    """A multiple of `PACK_ROWS`."""
    rows: int
    """Likewise, but for the weight's last."""
    dtype: torch.dtype
    """Of the numbers: a float type, or int8 or uint8 of a quantized weight."""
    places: tuple[tuple[int, int], ...]
    """The open file's descriptor and the offset of the first row's first byte, of floats, or of a quantized weight's q,
    its scale and, with int4, its zero."""


class StoredError(Exception):
    """A part can't be read.

    Attributes:
        part, place: by index, which.
        reason: the system's words; empty where the file ends before the part does.
    """

    def __init__(self, part: int, place: int, reason: str) -> None:
        super().__init__(reason)
        self.part, self.place, self.reason = part, place, reason


@runtime_checkable
class PacksStored(Protocol):
    """What a backend has besides `Kernels` if it reads weights from files by itself: in its own threads, and without
    Python's lock, so that Python has other work done meanwhile."""

    def pack_stored(self, parts: Sequence[StoredPart]) -> None:
        """Reads and packs them. Raises StoredError."""
        ...


class Kernels(Protocol):
    """One backend. Between kernels, rows have the backend's `activation_dtype`; "activations" below.

    `out` is memory of the result's size for a backend that can use it, contiguous; the result is what is returned.
    """

    @property
    def name(self) -> str:
        """As `--backend` calls it."""
        ...

    @property
    def isa(self) -> str:
        """The instruction set: what results' bits depend on besides the backend and its version."""
        ...

    @property
    def device(self) -> torch.device:
        """Where tensors lie."""
        ...

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's bits depend on that row alone."""
        ...

    @property
    def default_block_size(self) -> int:
        """Positions of a KV block where nothing else was asked for."""
        ...

    def activation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What activations, norm weights and biases are kept in where weights are stored in `dtype`."""
        ...

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What keys and values are best kept in, at no less precision, where weights are stored in `dtype`."""
        ...

    def packer(self, spec: WeightSpec) -> Packer: ...

    def nbytes(self, prepared: PreparedLinear) -> int:
        """Bytes that a product reads of a weight."""
        ...

    def linear(self, x: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        """[T, in] to [T, out]: x @ weight.T + bias."""
        ...

    def gated_linear(self, gate_up: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        """`linear` of silu(gate) * up: [T, 2 * in], gate then up, to [T, out]."""
        ...

    def embed(self, ids: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        """int64 ids [T] to the weight's rows, [T, in]."""
        ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns (norm(x + residual) * weight, x + residual), both [T, H]; without `residual`, x itself is normed.

        With `residual`, either argument's memory may hold the results; `out` is for the norm of x alone.

        The norm is computed in float32: y / sqrt(mean(y²) + eps), rounded to activations, times the weight.
        """
        ...

    def rope_and_cache(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        slots: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """Norms (where weights [D] are given) and rotates queries and keys, writes keys and values to the cache.

        `qkv` is [T, (Q + 2K) * D]: query heads, key heads, value heads. `cos` and `sin` are float32 [T, D / 2]; the
        rotation pairs element i with i + D / 2. `slots` int64 [tokens] holds block * block size + offset of the first
        `tokens` rows; dummy rows have none and are not written. Returns the queries, [T, Q, D].
        """
        ...

    def plan_attention(self, batch: RaggedBatch, kv_heads: int, windows: Sequence[int | None]) -> AttentionPlan:
        """Prepares what all layers of a step share. `windows` names each sliding window that a layer will ask for."""
        ...

    def paged_attention(
        self, queries: Tensor, cache: KVCache, plan: AttentionPlan, window: int | None, out: Tensor | None = None
    ) -> Tensor:
        """Causal attention over the cache for prefills, chunks and decodes in one call: [T, Q, D] to [T, Q * D].

        A query at position p reads positions max(0, p - window + 1) to p of its sequence. Scale is D^-0.5; arithmetic
        is float32. Dummy rows come back as zeros.
        """
        ...

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Draws one id a row from float32 logits [S, V], which may be overwritten; returns int64 [S].

        Ids are ordered by logit / temperature, falling, ties by rising id. top_k keeps the first k of that order; top_p
        the shortest run from its start whose probabilities (softmax over what top_k kept) sum to at least top_p; min_p
        those at least min_p times as probable as the first. Of the ids left the one with the greatest logit /
        temperature + Gumbel(id) wins (`worker.kernels.philox`), ties to the lower id. Temperature 0 takes the first.
        """
        ...

    def edit_logits(self, logits: Tensor, edits: LogitEdits) -> None:
        """Edits float32 logits [S, V] in place."""
        ...

    def logprobs(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Natural logarithms of softmax(logits), float32 [S, V]: of `tokens` int64 [S], and of the `count` most
        probable ids, most probable first, ties by id. Returns [S], ids [S, count] and [S, count].
        """
        ...
