"""The model's arithmetic behind one small interface, and its backends.

`reference` is plain torch: it serves where nothing faster is built, and it is the oracle that other backends are tested
against.
"""

from worker.kernels.interface import AttentionPlan, Kernels, KVCache, PreparedLinear, RaggedBatch, SamplingBatch
from worker.kernels.reference import ReferenceKernels

__all__ = [
    "AttentionPlan",
    "KVCache",
    "Kernels",
    "PreparedLinear",
    "RaggedBatch",
    "ReferenceKernels",
    "SamplingBatch",
]
