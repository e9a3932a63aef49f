"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The number behind a token depends on (seed, token id, position, choice) alone, so that any worker, in any batch,
after any restart, draws the same token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

MAX_GUMBEL = 22.9
"""No value of `gumbel` exceeds this: the smallest uniform is 2^-33, whose Gumbel is 33 ln 2 = 22.87."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32: four counter words and two key words to four output words.

    Words are unsigned 32-bit values held in int64 tensors of one shape (or broadcastable to one).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(_ROUNDS):
        if step:
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        # A product of two 32-bit words wraps in int64 but keeps its 64 bits, so masking after the shift is exact.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> 32 & _MASK) ^ c1 ^ k0,
            second & _MASK,
            (first >> 32 & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
    return c0, c1, c2, c3


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise in float32 for random words (int64, below 2^32); at most `MAX_GUMBEL`.

    u = (word + 0.5) / 2^32, kept below 1 so that its logarithm stays finite; the noise is -log(-log(1 - u)).
    """
    uniform = words.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_max_(1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
