"""Qwen2 and Qwen3 (https://arxiv.org/abs/2505.09388): pre-norm decoder layers with grouped-query attention and SwiGLU.

T is the step's number of rows, H the hidden size; `worker.kernels.interface` states the other layouts. Sizes
here are the whole model's; a rank's share of the heads shows in the shapes of its weights and cache. Hidden states are
whole on every rank. Of a pipeline's stages each has some of the layers, the first one the embedding, and the last one
the final norm and the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.kernels import AttentionPlan, Kernels, KVCache
from worker.model.config import ModelConfig
from worker.model.layers import Embedding, Head, Linear, Part, RMSNorm, RowLinear
from worker.model.module import Module, ModuleList
from worker.model.plan import Shard, stage_layers
from worker.parallel import Group


class Buffers:
    """Memory for what layers hand on within themselves, so that steps of few rows need not allocate it hundreds of
    times. A buffer's contents last until the next layer asks for it.

    Steps of many rows get fresh memory: there, allocating is nothing beside the work.
    """

    ROWS = 64

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._whole: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int], Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """[rows, columns]; `columns` is always the same for a name."""
        found = self._views.get((name, rows))
        if found is not None:
            return found
        if rows > self.ROWS:
            return torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        if name not in self._whole:
            self._whole[name] = torch.empty(self.ROWS, columns, dtype=self.dtype, device=self.device)
        self._views[name, rows] = view = self._whole[name][:rows]
        return view


@dataclass(frozen=True, slots=True)
class LastRows:
    """Those of a step's rows that the last layer is to have results for. Of the others it computes queries, keys and
    values, and no more: nothing reads their hidden states."""

    rows: Tensor
    """int64 [R], at least one, rising."""
    attention: AttentionPlan
    """Of these rows alone."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What all layers of a step share."""

    cos: Tensor
    """float32 [T, head_dim / 2], of each row's position."""
    sin: Tensor
    slots: Tensor
    """int64 [tokens]: where each real row's key and value go."""
    attention: AttentionPlan
    buffers: Buffers
    last: LastRows | None = None
    """Where hidden states of few rows are asked for; None asks for all."""


class Attention(Module):
    """Grouped-query attention over the paged cache; Qwen3 norms each query and key head before rotating it."""

    def __init__(self, config: ModelConfig, window: int | None, kernels: Kernels, group: Group) -> None:
        self.kernels, self.window, self.eps = kernels, window, config.rms_norm_eps
        size, hidden = config.head_dim, config.hidden_size
        query_heads, kv_heads = config.num_heads, config.num_kv_heads
        self.qkv_proj = Linear(
            kernels,
            Part((query_heads * size, hidden), query_heads, config.qkv_bias),
            Part((kv_heads * size, hidden), kv_heads, config.qkv_bias),
            Part((kv_heads * size, hidden), kv_heads, config.qkv_bias),
        )
        self.q_norm = RMSNorm(kernels, size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(kernels, size, config.rms_norm_eps) if config.qk_norm else None
        self.o_proj = RowLinear(kernels, group, Part((hidden, query_heads * size), query_heads, config.output_bias))
        shard = Shard(group.rank, group.world)
        # This rank's.
        self.query_size = size * shard.local(query_heads, "num_attention_heads")
        self.qkv_size = self.query_size + 2 * size * shard.local(kv_heads, "num_key_value_heads")

    def __call__(self, x: Tensor, step: StepInputs, cache: KVCache, last: LastRows | None = None) -> Tensor:
        rows, take, attention = x.shape[0], step.buffers.take, step.attention
        queries = self.kernels.rope_and_cache(
            self.qkv_proj(x, take("qkv", rows, self.qkv_size)),
            step.cos,
            step.sin,
            cache,
            step.slots,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.eps,
            take("queries", rows, self.query_size),
        )
        if last is not None:
            queries, attention, rows = queries[last.rows], last.attention, len(last.rows)
        attended = self.kernels.paged_attention(
            queries, cache, attention, self.window, take("attended", rows, self.query_size)
        )
        return self.o_proj(attended, take("hidden", rows, x.shape[1]))


class MLP(Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, kernels: Kernels, group: Group) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(kernels, Part((inner, hidden), inner), Part((inner, hidden), inner))
        self.down_proj = RowLinear(kernels, group, Part((hidden, inner), inner), gated=True)
        self.inner_size = Shard(group.rank, group.world).local(inner, "intermediate_size")

    def __call__(self, x: Tensor, step: StepInputs) -> Tensor:
        rows, take = x.shape[0], step.buffers.take
        gate_up = self.gate_up_proj(x, take("gate_up", rows, 2 * self.inner_size))
        return self.down_proj(gate_up, take("hidden", rows, x.shape[1]))


class DecoderLayer(Module):
    """Attention and MLP, each on the norm of the residual stream, which travels beside the activations."""

    def __init__(self, config: ModelConfig, index: int, kernels: Kernels, group: Group) -> None:
        self.input_layernorm = RMSNorm(kernels, config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.windows[index], kernels, group)
        self.post_attention_layernorm = RMSNorm(kernels, config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, kernels, group)

    def __call__(
        self, x: Tensor, residual: Tensor | None, step: StepInputs, cache: KVCache, last: LastRows | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of `last` alone, if given."""
        fresh = step.buffers.take("normed", *x.shape) if residual is None else None
        x, residual = self.input_layernorm(x, residual, fresh)
        x = self.self_attn(x, step, cache, last)
        if last is not None:
            residual = residual[last.rows]
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x, step), residual


class Model(Module):
    """The backbone, or a stage of it: ids to hidden states."""

    def __init__(self, config: ModelConfig, kernels: Kernels, group: Group) -> None:
        self.group, self.hidden_size = group, config.hidden_size
        self.embed_tokens = None
        if group.first_stage:
            # The head shares the embedding's memory where it is in the same stage.
            tied = config.tie_word_embeddings and group.last_stage
            self.embed_tokens = Embedding(kernels, group, config.vocab_size, config.hidden_size, tied)
        layers = stage_layers(config.num_layers, group.stage, group.stages)
        self.layers = ModuleList((DecoderLayer(config, i, kernels, group) for i in layers), layers.start)
        self.norm = RMSNorm(kernels, config.hidden_size, config.rms_norm_eps) if group.last_stage else None

    def __call__(self, ids: Tensor, step: StepInputs, caches: Sequence[KVCache]) -> Tensor | None:
        rows, buffers = len(ids), step.buffers
        residual: Tensor | None
        if self.embed_tokens is not None:
            # What is embedded becomes the residual stream: its memory is nobody else's.
            x, residual = self.embed_tokens(ids, buffers.take("embedded", rows, self.hidden_size)), None
        else:
            shape = (2, rows, self.hidden_size)
            x, residual = self.group.take_over(torch.empty(shape, dtype=buffers.dtype, device=buffers.device))
        *before, final = self.layers
        for layer, cache in zip(before, caches[:-1], strict=True):
            x, residual = layer(x, residual, step, cache)
        x, residual = final(x, residual, step, caches[-1], None if self.norm is None else step.last)
        if self.norm is not None:
            return self.norm(x, residual)[0]
        self.group.hand_on(torch.stack((x, residual)))
        return None


class CausalLM(Module):
    """The backbone and the projection of hidden states to logits, which only chosen rows go through; or a stage of
    them."""

    def __init__(self, config: ModelConfig, kernels: Kernels, group: Group) -> None:
        self.config = config
        self.model = Model(config, kernels, group)
        self.lm_head = Head(kernels, group, config.vocab_size, config.hidden_size) if group.last_stage else None

    def __call__(self, ids: Tensor, step: StepInputs, caches: Sequence[KVCache]) -> Tensor | None:
        """int64 ids [T] to hidden states [T, H], or [R, H] of the step's `last`; writes the rows' keys and values to
        `caches`, one a layer.

        In a pipeline: takes over what the stage before has of these rows, and hands on what there is to hand on. The
        result is None in all stages but the last.
        """
        return self.model(ids, step, caches)

    def compute_logits(self, hidden: Tensor, buffers: Buffers | None = None) -> Tensor | None:
        """In the last stage, hidden states [R, H] to float32 logits [R, V], on rank 0; in `buffers` if given."""
        if self.lm_head is None:
            raise RuntimeError("logits come to be in the last stage")
        return self.lm_head.logits(hidden, None if buffers is None else buffers.take)
