"""The model's arithmetic behind one small interface, and its backends.

`cpu` is C++, compiled at install. `reference` is plain torch: it serves where nothing faster is built, and it is the
oracle that other backends are tested against.
"""

from worker.kernels.choice import BACKENDS, ChosenKernels, choose_kernels, pin_threads
from worker.kernels.cpu.native import INSTRUCTION_SETS, NativeError, usable_cpus
from worker.kernels.interface import (
    QUANTIZED_FORMATS,
    AttentionPlan,
    Kernels,
    KVCache,
    Packer,
    PreparedLinear,
    RaggedBatch,
    SamplingBatch,
    WeightSpec,
)
from worker.kernels.quantized import QuantizedWeight
from worker.kernels.reference import ReferenceKernels

__all__ = [
    "BACKENDS",
    "INSTRUCTION_SETS",
    "QUANTIZED_FORMATS",
    "AttentionPlan",
    "ChosenKernels",
    "KVCache",
    "Kernels",
    "NativeError",
    "Packer",
    "PreparedLinear",
    "QuantizedWeight",
    "RaggedBatch",
    "ReferenceKernels",
    "SamplingBatch",
    "WeightSpec",
    "choose_kernels",
    "pin_threads",
    "usable_cpus",
]
