"""flash-attn, where it is installed: three packages with three signatures behind one `FlashAttention`.

    flash-attn 2   `flash_attn`            sm_80 and up    blocks of multiples of 256 positions
    flash-attn 3   `flash_attn_interface`  sm_90           blocks of any size; 16 here, for short shared prefixes
    flash-attn 4   `flash_attn.cute`       sm_90, sm_100   any size; 128, that of its tiles, is the one that TMA loads

None is a dependency: each is compiled against a build of torch. A package is taken only if its functions accept what is
called here, by their own signatures: a release that renames an argument is found out at start and not in a step.

The cache stays [K, blocks, block size, D]; these packages take [blocks, block size, K, D] by strides, as a view.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import Tensor

from worker.kernels.interface import KVCache

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


class FlashError(Exception):
    """A package is not installed, or cannot be used here; says why."""


@dataclass(frozen=True, slots=True)
class Paged:
    """Where the sequences of a call lie: `worker.kernels.cuda.attention.CudaPlan`, as flash-attn reads it."""

    tables: Tensor
    """int32 [sequences, blocks]."""
    key_lengths: Tensor
    """int32 [sequences]: positions written, this step's included."""
    query_starts: Tensor
    """int32 [sequences + 1]: the row of each sequence's first query, and the number of rows."""
    key_starts: Tensor
    """int32 [sequences + 1]: running sums of `key_lengths`."""
    max_queries: int
    max_keys: int


class FlashAttention(Protocol):
    """Causal attention over a paged cache; both calls give [rows, Q, D]."""

    @property
    def name(self) -> str:
        """The package and its version."""
        ...

    @property
    def default_block_size(self) -> int: ...

    @property
    def block_multiple(self) -> int:
        """Block sizes must be multiples of this."""
        ...

    def mixed(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None) -> Tensor:
        """Chunks of any lengths, one after another in `queries` [rows, Q, D]."""
        ...

    def decode(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None) -> Tensor:
        """One query for each sequence."""
        ...


def _paged(pool: Tensor) -> Tensor:
    """[K, blocks, block size, D] as [blocks, block size, K, D]."""
    return pool.permute(1, 2, 0, 3)


def _left(window: int | None) -> int:
    """How many positions before its own a query reads; -1 for all."""
    return -1 if window is None else window - 1


@dataclass(frozen=True, slots=True)
class Flash2:
    """flash-attn 2 (Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023)."""

    name: str
    varlen: Callable[..., Tensor]
    with_kvcache: Callable[..., Tensor]
    default_block_size: int = 256
    block_multiple: int = 256

    def mixed(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None) -> Tensor:
        return self.varlen(
            queries,
            _paged(cache.keys),
            _paged(cache.values),
            cu_seqlens_q=where.query_starts,
            cu_seqlens_k=where.key_starts,
            max_seqlen_q=where.max_queries,
            max_seqlen_k=where.max_keys,
            causal=True,
            window_size=(_left(window), 0 if window else -1),
            block_table=where.tables,
        )

    def decode(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None) -> Tensor:
        out = self.with_kvcache(
            queries.unsqueeze(1),
            _paged(cache.keys),
            _paged(cache.values),
            cache_seqlens=where.key_lengths,
            block_table=where.tables,
            causal=True,
            window_size=(_left(window), 0 if window else -1),
        )
        return out.squeeze(1)


@dataclass(frozen=True, slots=True)
class Flash3:
    """flash-attn 3 (Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision",
    2024). Its ragged call has no block table, so both calls are of the one that has."""

    name: str
    with_kvcache: Callable[..., Tensor]
    default_block_size: int = 16
    block_multiple: int = 1

    def mixed(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None) -> Tensor:
        return self.with_kvcache(
            queries,
            _paged(cache.keys),
            _paged(cache.values),
            cache_seqlens=where.key_lengths,
            page_table=where.tables,
            cu_seqlens_q=where.query_starts,
            max_seqlen_q=where.max_queries,
            causal=True,
            window_size=(_left(window), 0 if window else -1),
        )

    def decode(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None) -> Tensor:
        out = self.with_kvcache(
            queries.unsqueeze(1),
            _paged(cache.keys),
            _paged(cache.values),
            cache_seqlens=where.key_lengths,
            page_table=where.tables,
            causal=True,
            window_size=(_left(window), 0 if window else -1),
        )
        return out.squeeze(1)


@dataclass(frozen=True, slots=True)
class Flash4:
    """flash-attn 4, in CuTe DSL, a pre-release: one ragged call, which decodes go through too."""

    name: str
    varlen: Callable[..., tuple[Tensor, Tensor | None]]
    default_block_size: int = 128
    block_multiple: int = 1

    def mixed(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None) -> Tensor:
        result: Any = self.varlen(
            queries,
            _paged(cache.keys),
            _paged(cache.values),
            cu_seqlens_q=where.query_starts,
            max_seqlen_q=where.max_queries,
            max_seqlen_k=where.max_keys,
            seqused_k=where.key_lengths,
            page_table=where.tables,
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
        )
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    def decode(self, queries: Tensor, cache: KVCache, where: Paged, window: int | None) -> Tensor:
        return self.mixed(queries, cache, where, window)


_ARGUMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "flash_attn": {
        "flash_attn_varlen_func": (
            "cu_seqlens_q",
            "cu_seqlens_k",
            "max_seqlen_q",
            "max_seqlen_k",
            "causal",
            "window_size",
            "block_table",
        ),
        "flash_attn_with_kvcache": ("cache_seqlens", "block_table", "causal", "window_size"),
    },
    "flash_attn_interface": {
        "flash_attn_with_kvcache": (
            "cache_seqlens",
            "page_table",
            "cu_seqlens_q",
            "max_seqlen_q",
            "causal",
            "window_size",
        ),
    },
    "flash_attn.cute": {
        "flash_attn_varlen_func": (
            "cu_seqlens_q",
            "max_seqlen_q",
            "max_seqlen_k",
            "seqused_k",
            "page_table",
            "causal",
            "window_size",
        ),
    },
}
"""By module, the functions that are called, and the arguments that they are given by name behind three tensors."""

_DISTRIBUTIONS = {
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "flash_attn.cute": "flash-attn-4",
}


def candidates(capability: tuple[int, int]) -> tuple[str, ...]:
    """Modules that have kernels for a GPU, best first, by its compute capability."""
    if capability < (8, 0):
        return ()
    if capability[0] == 9:
        return ("flash_attn_interface", "flash_attn", "flash_attn.cute")
    if capability[0] in (10, 11):
        return ("flash_attn.cute", "flash_attn")
    return ("flash_attn",)


def find(capability: tuple[int, int], dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> FlashAttention:
    """The best package that is installed for a GPU and a model. Raises FlashError, with every reason."""
    if dtype not in DTYPES or kv_dtype != dtype:
        raise FlashError(f"flash-attn takes float16 or bfloat16, keys as queries: not {kv_dtype} and {dtype}")
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise FlashError(f"flash-attn takes heads of multiples of 8 up to {MAX_HEAD_DIM}, the model has {head_dim}")
    modules = candidates(capability)
    reasons = [] if modules else [f"flash-attn has no kernels for sm_{capability[0]}{capability[1]}"]
    for module in modules:
        try:
            return load(module)
        except FlashError as error:
            reasons.append(str(error))
    raise FlashError("; ".join(reasons))


def load(module: str) -> FlashAttention:
    """The package that a module belongs to. Raises FlashError where it isn't installed or has other signatures."""
    name = _DISTRIBUTIONS[module]
    try:
        found = importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: compiled against another torch
        raise FlashError(f"{name} is not installed ({error})") from error
    functions = {function: getattr(found, function, None) for function in _ARGUMENTS[module]}
    for function, arguments in _ARGUMENTS[module].items():
        _check(f"{module}.{function}", functions[function], arguments)
    full = f"{name} {_version(found, name)}"
    match module:
        case "flash_attn":
            return Flash2(full, **_named(functions, varlen="flash_attn_varlen_func", with_kvcache=_KVCACHE))
        case "flash_attn_interface":
            return Flash3(full, **_named(functions, with_kvcache=_KVCACHE))
        case _:
            return Flash4(full, **_named(functions, varlen="flash_attn_varlen_func"))


_KVCACHE = "flash_attn_with_kvcache"


def _named(functions: dict[str, Any], **names: str) -> dict[str, Any]:
    return {field: functions[name] for field, name in names.items()}


def _check(name: str, function: Any, arguments: Sequence[str]) -> None:
    if function is None:
        raise FlashError(f"{name} is missing")
    parameters = list(inspect.signature(function).parameters.values())
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    missing = [argument for argument in arguments if argument not in named]
    if missing:
        raise FlashError(f"{name} takes no {', '.join(missing)}: not a release that is known here")
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 3 or any(
        p.default is p.empty and p.name not in arguments for p in parameters[3:] if p.kind != p.VAR_KEYWORD
    ):
        raise FlashError(f"{name} must be given more than is known here")


def _version(module: Any, distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "of no version"))
