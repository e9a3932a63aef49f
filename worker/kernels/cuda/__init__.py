"""The backend for NVIDIA GPUs: cuBLAS for products of 16 bits, flash-attn for attention where it is installed, and
our own kernels in Triton for what else a step needs.

No machine that this was written on had a GPU: the parts are tested on CPUs, by stand-ins with flash-attn's signatures
and by Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from worker.kernels.cuda import flash, linear
from worker.kernels.cuda.attention import CudaPlan, plan_attention
from worker.kernels.cuda.device import CudaError, Device, open_device
from worker.kernels.cuda.flash import FlashAttention, FlashError
from worker.kernels.cuda.logits import edit_logits
from worker.kernels.cuda.ops import Ops, SamplingTensors
from worker.kernels.cuda.staging import Staging
from worker.kernels.interface import (
    KVCache,
    LogitEdits,
    Packer,
    PreparedLinear,
    RaggedBatch,
    SamplingBatch,
    WeightSpec,
)
from worker.kernels.reference.logits import logprobs

__all__ = ["ATTENTIONS", "Attention", "CudaError", "CudaKernels", "CudaOptions", "open_device", "open_kernels"]

Attention = Literal["auto", "flash", "triton"]
ATTENTIONS: tuple[Attention, ...] = ("auto", "flash", "triton")


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """What the backend is to be for one model on one GPU."""

    index: int = 0
    """Of the GPU, among those that can be seen."""
    deterministic: bool = False
    """Whether a row's bits shall not depend on its batch: our own attention for every query, and products of a fixed
    number of rows."""
    attention: Attention = "auto"
    dtype: torch.dtype = torch.bfloat16
    """Of activations, and weights that are not quantized."""
    kv_dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128


def open_kernels(options: CudaOptions) -> tuple[CudaKernels, str]:
    """The backend on its GPU, and a sentence on its attention. Raises CudaError."""
    gpu = open_device(options.index, deterministic=options.deterministic)
    return choose(gpu, options)


def choose(gpu: Device, options: CudaOptions) -> tuple[CudaKernels, str]:
    """`open_kernels` on a given device."""
    try:
        from worker.kernels.cuda.triton_ops import TritonOps  # CPU builds of torch bring no Triton
    except ImportError as error:
        raise CudaError(f"Triton, which the CUDA builds of torch bring, cannot be imported ({error})") from error
    found, why = None, "asked for"
    if options.deterministic:
        if options.attention == "flash":
            raise CudaError("flash-attn's sums follow the batch: --deterministic goes with Triton's attention")
        why = "deterministic"
    elif options.attention != "triton":
        try:
            found = flash.find(gpu.capability, options.dtype, options.kv_dtype, options.head_dim)
        except FlashError as error:
            if options.attention == "flash":
                raise CudaError(str(error)) from error
            why = str(error)
        else:
            why = "installed"
    kernels = CudaKernels(gpu, TritonOps(fixed=options.deterministic), found, deterministic=options.deterministic)
    return kernels, f"{gpu.name}, attention by {kernels.attention}: {why}"


class CudaKernels:
    """Implements `worker.kernels.Kernels` on one GPU; used by one thread.

    Activations have the dtype that weights are kept in.
    """

    name = "cuda"

    def __init__(self, gpu: Device, ops: Ops, attention: FlashAttention | None, *, deterministic: bool) -> None:
        self.gpu, self.staging = gpu, Staging(gpu)
        self._ops, self._attention, self._deterministic = ops, attention, deterministic

    @property
    def isa(self) -> str:
        major, minor = self.gpu.capability
        mode = ", deterministic" if self._deterministic else ""
        libraries = f"CUDA {torch.version.cuda}, {self._ops.name}, attention by {self.attention}"
        return f"sm_{major}{minor} of {self.gpu.name}, {libraries}{mode}"

    @property
    def device(self) -> torch.device:
        return self.gpu.torch

    @property
    def batch_invariant(self) -> bool:
        return self._deterministic

    @property
    def default_block_size(self) -> int:
        return 16 if self._attention is None else self._attention.default_block_size

    @property
    def block_multiple(self) -> int:
        """Block sizes must be multiples of this."""
        return 1 if self._attention is None else self._attention.block_multiple

    @property
    def attention(self) -> str:
        """What computes attention."""
        return self._ops.name if self._attention is None else self._attention.name

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def activation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def packer(self, spec: WeightSpec) -> Packer:
        return linear.CudaPacker(spec, self.staging, self.device)

    def nbytes(self, prepared: PreparedLinear) -> int:
        return linear.nbytes(prepared)

    def linear(self, x: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        if isinstance(prepared, linear.QuantizedLinear):
            return self._ops.linear(x, prepared.weight, prepared.bias, out)
        return linear.dense(x, prepared, out, fixed_rows=self._deterministic)

    def gated_linear(self, gate_up: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        return self.linear(self.silu_mul(gate_up), prepared, out)

    def embed(self, ids: Tensor, prepared: PreparedLinear, out: Tensor | None = None) -> Tensor:
        return linear.embed(ids, prepared)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._ops.rms_norm(x, weight, eps, residual)

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
        kv_heads, _, _, head_dim = cache.keys.shape
        rows, width = qkv.shape
        heads = width // head_dim - 2 * kv_heads
        queries = qkv.new_empty(rows, heads, head_dim) if out is None else out.view(rows, heads, head_dim)
        return self._ops.rope_and_cache(qkv, cos, sin, cache, slots, q_norm, k_norm, eps, queries)

    def plan_attention(self, batch: RaggedBatch, kv_heads: int, windows: Sequence[int | None]) -> CudaPlan:
        return plan_attention(batch, self.staging)

    def paged_attention(
        self, queries: Tensor, cache: KVCache, plan: CudaPlan, window: int | None, out: Tensor | None = None
    ) -> Tensor:
        rows, heads, head_dim = queries.shape
        if out is None:
            out = queries.new_empty(rows, heads * head_dim)
        whole, where = out.view(rows, heads, head_dim), plan.where
        if self._attention is not None:
            attend = self._attention.decode if plan.decode_only else self._attention.mixed
            whole.copy_(attend(queries, cache, where, window))
        elif plan.decode_only and not self._deterministic:
            self._ops.decode(queries, cache, where, window, whole)
        else:
            # One kernel for whatever chunk a query comes in, where its bits must not tell.
            self._ops.mixed(queries, cache, where, window, whole)
        return out

    def silu_mul(self, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, 2 * N], gate then up, to silu(gate) * up, [T, N]."""
        if out is None:
            out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        return self._ops.silu_mul(gate_up, out)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        size = logits.shape[1]
        filtered = (batch.top_k > 0) & (batch.top_k < size) | (batch.top_p < 1) | (batch.min_p > 0)
        temperature, top_k, top_p, min_p, seed, choice, position = self.staging.upload(
            batch.temperature,
            batch.top_k,
            batch.top_p,
            batch.min_p,
            batch.seed.view(np.int64),
            batch.choice,
            batch.position,
        )
        greedy = not (batch.temperature > 0).any()
        rows = SamplingTensors(
            temperature, top_k, top_p, min_p, seed, choice, position, greedy=greedy, filtered=bool(filtered.any())
        )
        return self._ops.sample(logits, rows)

    def edit_logits(self, logits: Tensor, edits: LogitEdits) -> None:
        edit_logits(logits, edits, self.staging)

    def logprobs(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return logprobs(logits, tokens, count)
