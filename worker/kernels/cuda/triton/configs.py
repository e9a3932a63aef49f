"""How kernels are launched: tile sizes, warps and stages, from a table that ships with the code.

Nothing is tuned while requests are served: `tables.json` names, for each kernel, architecture and class of shapes, one
launch. Its numbers were chosen for registers and shared memory (`scripts.triton_kernels` says what each takes); none
has been timed on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
import triton

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities with a table of their own; others take that of the next below."""

_TABLES = Path(__file__).with_name("tables.json")

Launch = Mapping[str, int]
"""Constants of a kernel by name, with `num_warps` and `num_stages`."""


@cache
def tables() -> Mapping[str, Mapping[str, Mapping[str, Launch]]]:
    """By kernel, then by architecture ("80") or "all", then by class of shapes."""
    read: Mapping[str, Mapping[str, Mapping[str, Launch]]] = json.loads(_TABLES.read_text())
    return read


@cache
def architecture(device: torch.device) -> int:
    """The table's architecture for a device; the interpreter and compilation without a device take sm_90's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in ARCHITECTURES if known <= 10 * major + minor), default=ARCHITECTURES[0])


@cache
def launch(kernel: str, shape: str, arch: int) -> Launch:
    """The launch of `kernel` for a class of shapes. Raises KeyError for a class that the table does not name."""
    by_arch = tables()[kernel]
    return by_arch.get(str(arch), by_arch.get("all", {}))[shape]


def tiles(size: int, tile: int) -> int:
    """Tiles that cover `size`."""
    return -(-size // tile)


def power_of_two(size: int) -> int:
    """The least power of two that is no less."""
    return int(triton.next_power_of_2(size))
