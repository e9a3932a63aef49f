"""`TorchRunner`: the engine's `ModelRunner` over a model folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import ClassVar, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.engine.plan import Drawn, StepPlan
from worker.kernels import AttentionPlan, Kernels, KVCache, PreparedLinear, RaggedBatch, choose_kernels
from worker.kernels.cpu import CpuKernels
from worker.kernels.cpu.memory import zeros
from worker.model import (
    ModelConfig,
    ModelError,
    Shard,
    check_shares,
    check_stages,
    load_model,
    resolve_quantization,
    stage_layers,
)
from worker.model.config import DTYPES
from worker.model.layers import Matrix
from worker.model.module import Module
from worker.model.qwen import Buffers, LastRows, StepInputs
from worker.model.rope import rotation_table
from worker.parallel import Group
from worker.runner.batch import StepArrays, build_step, only_rows, pipeline_parts
from worker.runner.drawing import draw_all, score_all
from worker.runner.replay import Replay

CODES = {"int8": torch.int8, "int16": torch.int16, "fp8": torch.float8_e4m3fn}
"""What keys and values can be kept in with scales, by the settings' names."""

SCORED_ROWS = 32
"""Rows whose logits are held at a time where only log-probabilities are wanted of them."""


def resolve_dtype(config: ModelConfig, dtype: str) -> torch.dtype:
    """ "auto" is the checkpoint's own. Raises ModelError for an unknown name."""
    name = config.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ModelError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    resolved: torch.dtype = getattr(torch, name)
    return resolved


def resolve_kv_dtype(config: ModelConfig, kv_dtype: str, dtype: str, kernels: Kernels | None = None) -> torch.dtype:
    """What keys and values are kept in; "auto" is what the kernels like best for `dtype`, and where none are given
    `dtype` itself. Raises ModelError for an unknown name."""
    if kv_dtype in CODES:
        return CODES[kv_dtype]
    if kv_dtype != "auto":
        return resolve_dtype(config, kv_dtype)
    resolved = resolve_dtype(config, dtype)
    return resolved if kernels is None else kernels.cache_dtype(resolved)


def kv_bytes_per_position(config: ModelConfig, kv_dtype: torch.dtype, world: int = 1, layers: int | None = None) -> int:
    """Bytes of cache that a rank of `world` ranks takes over so many layers, all if None, keys and values and the
    scales that go with codes (a head that several ranks hold is in each)."""
    heads = Shard(0, world).local(config.num_kv_heads, "num_key_value_heads")
    scale = torch.float32.itemsize if kv_dtype in CODES.values() else 0
    layers = config.num_layers if layers is None else layers
    return 2 * layers * heads * (config.head_dim * kv_dtype.itemsize + scale)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros, but a CPU's pages take neither memory nor time until they are written, or until `gather_pages`.
    Small ones at first: every head's blocks lie apart, and a large page for each would be all of it in one step."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _multiplies(module: Module) -> TypeGuard[Matrix]:
    return isinstance(module, Matrix) and module.multiplied


class TorchRunner:
    """A model, or a rank's share of it, on its kernels' device with its paged KV cache. Not thread-safe: one step at a
    time. The ranks of a group must execute the same plans in the same order.

    Args:
        num_blocks: of the cache; None leaves it to `make_cache`, without which nothing can be executed.
        block_size: positions of a block; None is the kernels' own choice.
        dtype: what weights are kept in that are not quantized; "auto" is the checkpoint's own.
        kv_dtype: what keys and values are kept in, as of `resolve_kv_dtype`.
        quantize: "none", or what the weights are quantized to while they are loaded.
        kernels: the backend; None takes the best there is, on one thread.
        on_reading: as of `load_model`.

    Raises ModelError from the constructor for a folder that cannot be served.
    """

    scores_prompts: ClassVar[bool] = True
    """Whether log-probabilities of prompts can be asked for."""

    def __init__(
        self,
        folder: Path,
        *,
        num_blocks: int | None,
        block_size: int | None = None,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        quantize: str = "none",
        kernels: Kernels | None = None,
        group: Group | None = None,
        on_reading: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = ModelConfig.read(folder)
        self.kernels = kernels or choose_kernels(head_dim=self.config.head_dim).kernels
        block_size = block_size or self.kernels.default_block_size
        if 256 % block_size:
            raise ValueError(f"need blocks of a size that divides 256: got {block_size}")
        self.dtype = resolve_dtype(self.config, dtype)
        self.kv_dtype = resolve_kv_dtype(self.config, kv_dtype, dtype, self.kernels)
        self.quantization = resolve_quantization(self.config, quantize)
        self._num_blocks, self._block_size = 0, block_size
        self._group = group = group or Group()
        check_shares(self.config, group.world)
        check_stages(self.config, group.stages)
        self._layers = len(stage_layers(self.config.num_layers, group.stage, group.stages))
        """Of this stage."""
        self._kv_heads = Shard(group.rank, group.world).local(self.config.num_kv_heads, "num_key_value_heads")
        self._buffers = Buffers(self.kernels.activation_dtype(self.dtype), self.kernels.device)
        self._windows = tuple(dict.fromkeys(self.config.windows))
        with torch.inference_mode():
            self._model = load_model(
                folder,
                self.config,
                self.kernels,
                self.dtype,
                group=group,
                quantize=quantize,
                on_reading=on_reading,
            )
        self.caches: tuple[KVCache, ...] = ()
        """One a layer of this stage."""
        self._replay: Replay | None = None
        if num_blocks is not None:
            self.make_cache(num_blocks)

    def make_ready(self) -> None:
        """Does what takes all ranks, once their group is connected; nothing here."""

    def make_cache(self, num_blocks: int, dummies: int = 0) -> None:
        """Makes room for keys and values, all zero: blocks for sequences, and behind them `dummies` for rows that no
        sequence has. Raises ValueError for fewer than one block."""
        if num_blocks < 1:
            raise ValueError(f"need at least one block, got {num_blocks}")
        self._num_blocks = num_blocks
        # Longer sequences than the cache holds cannot come up.
        self._max_positions = min(self.config.max_positions, num_blocks * self._block_size)
        device = self.kernels.device
        shape = (self._kv_heads, num_blocks + dummies, self._block_size, self.config.head_dim)
        with torch.inference_mode():
            cos, sin = rotation_table(self.config.rope, self.config.head_dim, self._max_positions)
            self._cos, self._sin = cos.to(device), sin.to(device)
            self.caches = tuple(self._new_cache(shape) for _ in range(self._layers))
            if isinstance(self.kernels, CpuKernels) and self._group.size == 1:
                blocks = -(-self._max_positions // self._block_size)
                self._replay = Replay(self.kernels, self.caches, self._cos, self._sin, blocks)

    def _new_cache(self, shape: tuple[int, ...]) -> KVCache:
        keys, values = (_zeros(shape, self.kv_dtype, self.kernels.device) for _ in range(2))
        if self.kv_dtype not in CODES.values():
            return KVCache(keys, values)
        key_scales, value_scales = (_zeros(shape[:3], torch.float32, self.kernels.device) for _ in range(2))
        return KVCache(keys, values, scales=(key_scales, value_scales))

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def positions_ahead(self) -> int:
        """How many positions of a sequence are computed before they are asked for, where it has blocks for them."""
        return 0

    @property
    def window(self) -> int | None:
        """How many positions a query reads in any layer, its own included; None where a layer reads all before it."""
        windows = [window for window in self._windows if window is not None]
        return max(windows) if len(windows) == len(self._windows) else None

    def gather_pages(self) -> bool:
        """Moves what of a CPU's weights didn't come into large pages there, where the system has them: small ones cost
        1 to 3% of a decode step. Then gives keys and values all their memory, in such pages too, which streams would
        else wait for as the cache fills. Takes seconds, beside steps if need be; another thread may call it.
        Returns whether the backend is the cpu kernels', which alone has such memory."""
        if not isinstance(self.kernels, CpuKernels):
            return False
        for matrix in self._matrices():
            if not self.kernels.gather_pages(matrix):
                break  # nor the others
        for cache in self.caches:
            for tensor in cache.tensors:
                self.kernels.populate(tensor)
        return True

    def _matrices(self) -> Collection[PreparedLinear]:
        """What is multiplied by, each once."""
        return {id(m.prepared): m.prepared for _, m in self._model.named_modules() if _multiplies(m)}.values()

    @property
    def weight_bytes(self) -> int:
        """What a step reads of this rank's weights, each once: all but a table that is only looked up."""
        return sum(map(self.kernels.nbytes, self._matrices()))

    @property
    def kv_bytes_per_position(self) -> int:
        """Of this rank's cache."""
        return kv_bytes_per_position(self.config, self.kv_dtype, self._group.world, self._layers)

    def operations(self, start: int, stop: int, *, draws: int) -> int:
        """Multiplications and additions of computing a sequence's positions `start` to `stop` and drawing from the last
        one, all ranks together. The last layer computes no more of the others than queries, keys and values."""
        config = self.config
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        before = config.hidden_size * (query + 2 * kv)  # attention
        behind = config.hidden_size * (query + 3 * config.intermediate_size)
        attended = (stop * (stop + 1) - start * (start + 1)) // 2
        layer = (stop - start) * (before + behind) + 2 * query * attended
        last = (stop - start) * before + behind + 2 * query * stop
        head = draws * config.hidden_size * config.vocab_size
        return 2 * ((config.num_layers - 1) * layer + last + head)

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        """See `worker.engine.plan.ModelRunner.execute`. Rank 0 alone draws: on others every entry is empty."""
        draws = [draw for chunk in plan.chunks for draw in chunk.draws]
        with torch.inference_mode():
            self._copy(plan.copies)
            step = self._build(plan)
            hidden = self._hidden(step)
            if hidden is None:
                return [[] for _ in plan.chunks]
            scored = self._score(hidden, step, plan)
            if not draws:
                return scored
            whole = np.array_equal(step.draw_rows, np.arange(len(hidden)))
            logits = self._logits(hidden if whole else hidden[torch.from_numpy(step.draw_rows)])
            if logits is None:
                return scored
            drawn = iter(draw_all(self.kernels, logits, draws).read())
        return [
            [*scores, *(next(drawn) for _ in chunk.draws)] for scores, chunk in zip(scored, plan.chunks, strict=True)
        ]

    def _score(self, hidden: Tensor, step: StepArrays, plan: StepPlan) -> list[list[Drawn]]:
        """Each chunk's scored ids; no entries but on rank 0 of the last stage."""
        scored: list[list[Drawn]] = [[] for _ in plan.chunks]
        first_row = 0
        for chunk, scores in zip(plan.chunks, scored, strict=True):
            first = int(np.searchsorted(step.hidden_rows, first_row)) if chunk.scored else 0
            for begin in range(0, len(chunk.scored), SCORED_ROWS):
                ids = chunk.scored[begin : begin + SCORED_ROWS]
                logits = self._logits(hidden[first + begin : first + begin + len(ids)])
                if logits is not None:
                    scores += score_all(self.kernels, logits, ids, chunk.scored_top)
            first_row += len(chunk.token_ids)
        return scored

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            for cache in self.caches:
                for pool in cache.tensors:
                    pool[:, target] = pool[:, source]

    def forward_logits(self, plan: StepPlan) -> Tensor:
        """Runs the step and returns the logits of all its tokens, float32 [plan.num_tokens, vocab]: those that predict
        the token after each. Takes num_tokens * vocab * 4 bytes. Ranks other than 0 get no rows."""
        with torch.inference_mode():
            hidden = self._hidden(self._build(plan, every=True))
            logits = None if hidden is None else self._model.compute_logits(hidden)
        return torch.empty(0, self.config.vocab_size) if logits is None else logits

    def _build(self, plan: StepPlan, *, every: bool = False) -> StepArrays:
        return build_step(
            plan,
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            max_positions=self._max_positions,
            vocab_size=self.config.vocab_size,
            every=every,
        )

    def _hidden(self, step: StepArrays) -> Tensor | None:
        """The hidden states that a step asks for, [R, H]; None in all stages but the last."""
        replayed = None if self._replay is None else self._replay.run(step, self._compute)
        if replayed is not None:
            return replayed if len(step.hidden_rows) == len(replayed) else replayed[torch.from_numpy(step.hidden_rows)]
        parts = list(pipeline_parts(step, self._group.stages))
        hidden = []
        for part in parts:
            rows = self._forward_rows(part)
            if rows is not None:
                # Few rows lie where the next part's will.
                hidden.append(rows.clone() if len(parts) > 1 else rows)
        self._group.settle()
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0] if hidden else None

    def _forward_rows(self, step: StepArrays) -> Tensor | None:
        """The hidden states that a step, or a part of one, asks for."""
        ids, positions, slots = self._upload(step.ids, step.positions, step.slots)
        attention, last = self._plan_attention(step.ragged), None
        if self._group.last_stage and len(step.last_layer_rows) < len(step.ids):
            (rows,) = self._upload(step.last_layer_rows)
            last = LastRows(rows, self._plan_attention(only_rows(step.ragged, step.last_layer_rows)))
        hidden = self._compute(ids, self._cos[positions], self._sin[positions], slots, attention, last)
        return None if hidden is None else hidden[: len(step.hidden_rows)]

    def _upload(self, *arrays: npt.NDArray[np.int64]) -> list[Tensor]:
        """To the kernels' device."""
        return [torch.from_numpy(array) for array in arrays]

    def _plan_attention(self, ragged: RaggedBatch) -> AttentionPlan:
        return self.kernels.plan_attention(ragged, self._kv_heads, self._windows)

    def _compute(
        self,
        ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        attention: AttentionPlan,
        last: LastRows | None = None,
    ) -> Tensor | None:
        return self._model(ids, StepInputs(cos, sin, slots, attention, self._buffers, last), self.caches)

    def _logits(self, rows: Tensor) -> Tensor | None:
        """Where rows are few, in memory that the next call writes to."""
        return self._model.compute_logits(rows, self._buffers)
