"""Kernels in Triton, each behind a function that checks shapes, picks its launch and starts it.

Nothing here waits for the GPU or reads a value on the host, so every function can be recorded into a graph. They run on
CPU tensors too, slowly, where TRITON_INTERPRET=1 is set before the first import.
"""

from worker.kernels.cuda.triton.attention import decode_attention, ragged_attention
from worker.kernels.cuda.triton.experts import ExpertPlan, combine_experts, expert_linear, plan_experts
from worker.kernels.cuda.triton.layouts import from_awq, from_gptq
from worker.kernels.cuda.triton.linear import Codes, linear
from worker.kernels.cuda.triton.logits import add_to_logits, ban, mask_logits, penalize_repeated
from worker.kernels.cuda.triton.rope import rope_and_cache
from worker.kernels.cuda.triton.rows import rms_norm, silu_mul
from worker.kernels.cuda.triton.sampling import Draws, sample

__all__ = [
    "Codes",
    "Draws",
    "ExpertPlan",
    "add_to_logits",
    "ban",
    "combine_experts",
    "decode_attention",
    "expert_linear",
    "from_awq",
    "from_gptq",
    "linear",
    "mask_logits",
    "penalize_repeated",
    "plan_experts",
    "ragged_attention",
    "rms_norm",
    "rope_and_cache",
    "sample",
    "silu_mul",
]
