"""Rotation angles: plain RoPE (Su et al., 2021) and YaRN (Peng et al., 2023), as transformers computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.model.config import RopeConfig, YarnConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of elements, float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    wavelengths = rope.theta**exponents
    if rope.yarn is None:
        return 1.0 / wavelengths
    low, high = _ramp_bounds(rope.theta, rope.yarn, head_dim)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.yarn.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def _ramp_bounds(theta: float, yarn: YarnConfig, head_dim: int) -> tuple[float, float]:
    """Dimensions between which YaRN goes from keeping frequencies to dividing them by the factor."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(yarn.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else high + 0.001


def rotation_table(rope: RopeConfig, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, float32 [positions, head_dim / 2] each, times YaRN's attention factor."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies(rope, head_dim)[None, :]
    factor = 1.0 if rope.yarn is None else rope.yarn.attention_factor
    return angles.cos() * factor, angles.sin() * factor
