"""AWQ's and GPTQ's 4-bit layouts, turned into ours once, when weights are loaded.

Both pack eight values into an int32 and keep weights [in, out]. AWQ packs along the outputs, in the order 0, 2, 4, 6,
1, 3, 5, 7 (Lin et al., "AWQ", 2023; AutoAWQ's GEMM version). GPTQ packs along the inputs, in order, and its first
format stores zero points less one (Frantar et al., "GPTQ", 2022; AutoGPTQ's `checkpoint_format` "gptq", not "gptq_v2").
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.kernels.cuda.triton.linear import Codes

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def _unpack(packed: Tensor, order: tuple[int, ...]) -> Tensor:
    """int32 [rows, columns] to uint8 [rows, columns * 8]; nibble i of a word is the value `order[i]` of its eight."""
    shifts = torch.tensor([4 * order.index(value) for value in range(8)], device=packed.device)
    return ((packed[..., None] >> shifts) & 15).to(torch.uint8).flatten(1)


def _pack(values: Tensor) -> Tensor:
    """uint8 [N, K] to [N, K / 2], value 2i in the low half of byte i."""
    return values[:, ::2] | values[:, 1::2] << 4


def _group(inner: int, scales: Tensor) -> int:
    groups = scales.shape[0]
    if inner % groups or (size := inner // groups) % 32 or size & (size - 1):
        raise ValueError(f"groups must be powers of two of at least 32 inputs, got {inner} inputs in {groups} groups")
    return size


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Codes:
    """`qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out]. Raises ValueError."""
    values = _unpack(qweight, _AWQ_ORDER).t()
    zeros = _unpack(qzeros, _AWQ_ORDER).t().contiguous()
    return Codes(_pack(values).contiguous(), scales.t().contiguous(), zeros, _group(qweight.shape[0], scales))


def from_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, zeros_less_one: bool) -> Codes:
    """`qweight` int32 [in / 8, out], `qzeros` int32 [groups, out / 8], `scales` [groups, out].

    Raises ValueError for inputs in another order than their groups' (`desc_act`): they would have to be permuted.
    """
    inner = qweight.shape[0] * 8
    size = _group(inner, scales)
    if g_idx is not None and not torch.equal(g_idx.long().cpu(), torch.arange(inner) // size):
        raise ValueError("GPTQ weights with desc_act are not supported: inputs lie in another order than their groups")
    values = _unpack(qweight.t().contiguous(), _IN_ORDER)
    zeros = _unpack(qzeros, _IN_ORDER).t().contiguous()
    # A stored 15 means 16: as much as eight bits hold with ease.
    return Codes(_pack(values).contiguous(), scales.t().contiguous(), zeros + int(zeros_less_one), size)
