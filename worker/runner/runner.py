"""`TorchRunner`: the engine's `ModelRunner` over a model folder."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from worker.engine.plan import Drawn, StepPlan
from worker.kernels import Kernels, KVCache, choose_kernels
from worker.model import ModelConfig, ModelError, Shard, check_shares, load_model, resolve_quantization
from worker.model.config import DTYPES
from worker.model.layers import Matrix
from worker.model.module import Module
from worker.model.qwen import Buffers, StepInputs
from worker.model.rope import rotation_table
from worker.parallel import Group
from worker.runner.batch import StepArrays, build_step, padded
from worker.runner.drawing import draw_all


def resolve_dtype(config: ModelConfig, dtype: str) -> torch.dtype:
    """ "auto" is the checkpoint's own. Raises ModelError for an unknown name."""
    name = config.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ModelError(f"dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    resolved: torch.dtype = getattr(torch, name)
    return resolved


def kv_bytes_per_block(config: ModelConfig, kv_dtype: torch.dtype, block_size: int, world: int = 1) -> int:
    """Bytes of cache that one block takes over all layers, keys and values, and over all of `world` ranks (a head that
    several of them hold counts as often)."""
    heads = world * Shard(0, world).local(config.num_kv_heads, "num_key_value_heads")
    per_position = 2 * config.num_layers * heads * config.head_dim
    return per_position * block_size * kv_dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As torch.zeros, but pages that nothing has written yet take neither memory nor time. Small pages: every head's
    blocks lie apart, and a large page for each would take the whole pool at the first step."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def _multiplies(module: Module) -> TypeGuard[Matrix]:
    return isinstance(module, Matrix) and module.multiplied


class TorchRunner:
    """A model, or a rank's share of it, on this process's CPU with its paged KV cache. Not thread-safe: one step at a
    time. The ranks of a group must execute the same plans in the same order.

    Args:
        dtype: what weights are kept in that are not quantized; "auto" is the checkpoint's own.
        kv_dtype: what keys and values are kept in; "auto" is `dtype`.
        quantize: "none", or what the weights are quantized to while they are loaded.
        kernels: the backend; None takes the best there is, on one thread.

    Raises ModelError from the constructor for a folder that cannot be served.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_blocks: int,
        block_size: int = 16,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        quantize: str = "none",
        kernels: Kernels | None = None,
        group: Group | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1 or 256 % block_size:
            raise ValueError(f"need at least one block, of a size that divides 256: got {num_blocks} of {block_size}")
        self.config = ModelConfig.read(folder)
        self.dtype = resolve_dtype(self.config, dtype)
        self.kv_dtype = self.dtype if kv_dtype == "auto" else resolve_dtype(self.config, kv_dtype)
        self.quantization = resolve_quantization(self.config, quantize)
        self._num_blocks, self._block_size = num_blocks, block_size
        self.kernels = kernels or choose_kernels(head_dim=self.config.head_dim).kernels
        # Longer sequences than the cache holds cannot come up.
        self._max_positions = min(self.config.max_positions, num_blocks * block_size)
        group = group or Group()
        check_shares(self.config, group.world)
        self._kv_heads = Shard(group.rank, group.world).local(self.config.num_kv_heads, "num_key_value_heads")
        self._buffers = Buffers(self.kernels.activation_dtype(self.dtype))
        self._windows = tuple(dict.fromkeys(self.config.windows))
        with torch.inference_mode():
            self._model = load_model(folder, self.config, self.kernels, self.dtype, group=group, quantize=quantize)
            self._cos, self._sin = rotation_table(self.config.rope, self.config.head_dim, self._max_positions)
            shape = (self._kv_heads, num_blocks, block_size, self.config.head_dim)
            # One a layer.
            self.caches = tuple(
                KVCache(_zeros(shape, self.kv_dtype), _zeros(shape, self.kv_dtype))
                for _ in range(self.config.num_layers)
            )

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def weight_bytes(self) -> int:
        """What a step reads of this rank's weights, each once: all but a table that is only looked up."""
        matrices = {id(m.prepared): m.prepared for _, m in self._model.named_modules() if _multiplies(m)}
        return sum(self.kernels.nbytes(prepared) for prepared in matrices.values())

    @property
    def kv_bytes_per_position(self) -> int:
        """Of this rank's cache."""
        return 2 * self.config.num_layers * self._kv_heads * self.config.head_dim * self.kv_dtype.itemsize

    def operations(self, start: int, stop: int, *, draws: int) -> int:
        """Multiplications and additions of computing a sequence's positions `start` to `stop` and drawing from the last
        one, all ranks together."""
        config = self.config
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        layer = config.hidden_size * (2 * query + 2 * kv + 3 * config.intermediate_size)
        attended = (stop * (stop + 1) - start * (start + 1)) // 2
        head = draws * config.hidden_size * config.vocab_size
        return 2 * (config.num_layers * ((stop - start) * layer + 2 * query * attended) + head)

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        """See `worker.engine.plan.ModelRunner.execute`. Rank 0 alone draws: on others every entry is empty."""
        draws = [draw for chunk in plan.chunks for draw in chunk.draws]
        with torch.inference_mode():
            self._copy(plan.copies)
            step = self._build(plan)
            hidden = self._hidden(step)
            if not draws:
                return [[] for _ in plan.chunks]
            logits = self._logits(hidden[torch.from_numpy(step.draw_rows)])
            if logits is None:
                return [[] for _ in plan.chunks]
            drawn = iter(draw_all(self.kernels, logits, draws))
        return [[next(drawn) for _ in chunk.draws] for chunk in plan.chunks]

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            for cache in self.caches:
                cache.keys[:, target] = cache.keys[:, source]
                cache.values[:, target] = cache.values[:, source]

    def forward_logits(self, plan: StepPlan) -> Tensor:
        """Runs the step and returns the logits of all its tokens, float32 [plan.num_tokens, vocab]: those that predict
        the token after each. Takes num_tokens * vocab * 4 bytes. Ranks other than 0 get no rows."""
        with torch.inference_mode():
            logits = self._logits(self._hidden(self._build(plan))[: plan.num_tokens])
        return torch.empty(0, self.config.vocab_size) if logits is None else logits

    def _build(self, plan: StepPlan) -> StepArrays:
        return build_step(
            plan,
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            max_positions=self._max_positions,
            vocab_size=self.config.vocab_size,
            row_tile=self.kernels.row_tile,
        )

    def _hidden(self, step: StepArrays) -> Tensor:
        positions = torch.from_numpy(step.positions)
        inputs = StepInputs(
            cos=self._cos[positions],
            sin=self._sin[positions],
            slots=torch.from_numpy(step.slots),
            attention=self.kernels.plan_attention(step.ragged, self._kv_heads, self._windows),
            buffers=self._buffers,
        )
        return self._model(torch.from_numpy(step.ids), inputs, self.caches)

    def _logits(self, rows: Tensor) -> Tensor | None:
        count = rows.shape[0]
        whole = padded(count, self.kernels.row_tile)
        if whole != count:
            rows = torch.cat((rows, rows.new_zeros(whole - count, rows.shape[1])))
        return self._model.compute_logits(rows, count)
