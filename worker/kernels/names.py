"""What settings and checkpoints call the backends and what they compute with. Takes no torch."""

from __future__ import annotations

from typing import Literal

BACKENDS = ("cuda", "cpu", "reference")
"""In the order in which "auto" tries them."""

INSTRUCTION_SETS = ("avx512_amx", "avx512_vnni", "avx512", "avx2", "portable")
"""Of the cpu kernels, best first. `avx512_vnni` is AVX-512 with VNNI, `avx512_amx` that and AMX's products of bytes;
`portable` is what every x86-64 or other machine has."""
SAME_BITS = {"avx512_amx": "avx512_vnni"}
"""Instruction sets whose results are those of another one, bit by bit: AMX's sums are of integers, and exact."""

Format = Literal["int8", "int4"]

QUANTIZED_FORMATS: tuple[Format, ...] = ("int8", "int4")
"""Of weights; `worker.kernels.quantized` says what they mean."""
