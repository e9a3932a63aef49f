"""Kernels in Triton, each behind a function that checks shapes, picks its launch and starts it.

Nothing here waits for the GPU or reads a value on the host, so every function can be recorded into a graph. They run on
CPU tensors too, slowly, where TRITON_INTERPRET=1 is set before the first import.
"""

from worker.kernels.cuda.triton.attention import decode_attention, ragged_attention
from worker.kernels.cuda.triton.rope import rope_and_cache
from worker.kernels.cuda.triton.rows import rms_norm, silu_mul

__all__ = ["decode_attention", "ragged_attention", "rms_norm", "rope_and_cache", "silu_mul"]
