"""The model's arithmetic behind one small interface, and its backends.

`cpu` is C++, compiled at install. `reference` is plain torch: it serves where nothing faster is built, and it is the
oracle that other backends are tested against.
"""

import importlib
from typing import TYPE_CHECKING, Any

from worker.kernels.names import BACKENDS, INSTRUCTION_SETS, QUANTIZED_FORMATS

if TYPE_CHECKING:
    from worker.kernels.choice import ChosenKernels, choose_kernels, pin_threads
    from worker.kernels.cpu.native import NativeError, usable_cpus
    from worker.kernels.interface import (
        AttentionPlan,
        Kernels,
        KVCache,
        Packer,
        PacksStored,
        PreparedLinear,
        RaggedBatch,
        SamplingBatch,
        StoredError,
        StoredPart,
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
    "PacksStored",
    "PreparedLinear",
    "QuantizedWeight",
    "RaggedBatch",
    "ReferenceKernels",
    "SamplingBatch",
    "StoredError",
    "StoredPart",
    "WeightSpec",
    "choose_kernels",
    "pin_threads",
    "usable_cpus",
]

_HOMES = {
    "choice": ("ChosenKernels", "choose_kernels", "pin_threads"),
    "cpu.native": ("NativeError", "usable_cpus"),
    "interface": (
        "AttentionPlan",
        "KVCache",
        "Kernels",
        "Packer",
        "PacksStored",
        "PreparedLinear",
        "RaggedBatch",
        "SamplingBatch",
        "StoredError",
        "StoredPart",
        "WeightSpec",
    ),
    "quantized": ("QuantizedWeight",),
    "reference": ("ReferenceKernels",),
}


def __getattr__(name: str) -> Any:
    # Loaded when first used: settings, which are read before torch is imported, need only the names.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
