"""Qwen2 and Qwen3 (https://arxiv.org/abs/2505.09388): pre-norm decoder layers with grouped-query attention and SwiGLU.

T is the step's padded number of rows, H the hidden size; `worker.kernels.interface` states the other layouts. Sizes
here are the whole model's; a rank's share of the heads shows in the shapes of its weights and cache. Hidden states are
whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from worker.kernels import AttentionPlan, Kernels, KVCache
from worker.model.config import ModelConfig
from worker.model.layers import Embedding, Head, Linear, Part, RMSNorm, RowLinear
from worker.parallel import Group


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What all layers of a step share."""

    cos: Tensor
    """float32 [T, head_dim / 2], of each row's position."""
    sin: Tensor
    slots: Tensor
    """int64 [tokens]: where each real row's key and value go."""
    attention: AttentionPlan


class Attention(nn.Module):
    """Grouped-query attention over the paged cache; Qwen3 norms each query and key head before rotating it."""

    def __init__(self, config: ModelConfig, window: int | None, kernels: Kernels, group: Group) -> None:
        super().__init__()
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

    def forward(self, x: Tensor, step: StepInputs, cache: KVCache) -> Tensor:
        queries = self.kernels.rope_and_cache(
            self.qkv_proj(x),
            step.cos,
            step.sin,
            cache,
            step.slots,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.eps,
        )
        attended = self.kernels.paged_attention(queries, cache, step.attention, self.window)
        out: Tensor = self.o_proj(attended)
        return out


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, kernels: Kernels, group: Group) -> None:
        super().__init__()
        self.kernels = kernels
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(kernels, Part((inner, hidden), inner), Part((inner, hidden), inner))
        self.down_proj = RowLinear(kernels, group, Part((hidden, inner), inner))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.kernels.silu_mul(self.gate_up_proj(x)))
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each on the norm of the residual stream, which travels beside the activations."""

    def __init__(self, config: ModelConfig, index: int, kernels: Kernels, group: Group) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(kernels, config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.windows[index], kernels, group)
        self.post_attention_layernorm = RMSNorm(kernels, config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, kernels, group)

    def forward(self, x: Tensor, residual: Tensor | None, step: StepInputs, cache: KVCache) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, step, cache)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Model(nn.Module):
    """The backbone: ids to hidden states."""

    def __init__(self, config: ModelConfig, kernels: Kernels, group: Group) -> None:
        super().__init__()
        self.embed_tokens = Embedding(group, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, kernels, group) for i in range(config.num_layers))
        self.norm = RMSNorm(kernels, config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, step: StepInputs, caches: Sequence[KVCache]) -> Tensor:
        x, residual = self.embed_tokens(ids), None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, step, cache)
        normed: Tensor = self.norm(x, residual)[0]
        return normed


class CausalLM(nn.Module):
    """The backbone and the projection of hidden states to logits, which only chosen rows go through."""

    def __init__(self, config: ModelConfig, kernels: Kernels, group: Group) -> None:
        super().__init__()
        self.config = config
        self.model = Model(config, kernels, group)
        self.lm_head = Head(kernels, group, config.vocab_size, config.hidden_size)

    def forward(self, ids: Tensor, step: StepInputs, caches: Sequence[KVCache]) -> Tensor:
        """int64 ids [T] to hidden states [T, H]; writes the rows' keys and values to `caches`, one a layer."""
        hidden: Tensor = self.model(ids, step, caches)
        return hidden

    def compute_logits(self, hidden: Tensor, count: int) -> Tensor | None:
        """Hidden states [R, H], R a multiple of the kernels' row tile, to the first `count` rows' float32 logits
        [count, V], on rank 0."""
        return self.lm_head.logits(hidden, count)
