"""Device functions that several kernels share. Nothing here depends on a launch's shape."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run under Triton's interpreter, which multiplies bit patterns of bfloat16, and other numbers by a
library whose order of additions depends on where in a tile a row lies: float64 leaves next to nothing of that."""


@triton.jit
def dot(left, right, total):
    """total + left @ right in float32; operands share a dtype, whose products are exact."""
    if INTERPRETED:
        product = tl.dot(left.to(tl.float64), right.to(tl.float64), out_dtype=tl.float64)
        return total + product.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def decode_e4m3(code):
    """Bytes of float8 e4m3 (OCP 8-bit floating point specification) to float32, by way of float16's pattern.

    Integer arithmetic, so that sm_80, which has no such conversion, reads the same cache. NaN is not among our codes.
    """
    wide = code.to(tl.uint16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def encode_e4m3(value):
    """float32 to the nearest e4m3, ties to even, beyond 448 to 448: uint8."""
    # Scaled by 2^-120, e4m3's exponents, subnormals too, are float32's: what is left is to round 20 bits off.
    small = tl.minimum(tl.abs(value), 448.0) * 7.52316384526264e-37
    bits = small.to(tl.uint32, bitcast=True)
    code = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    return (code | tl.where(value < 0, 0x80, 0).to(tl.uint32)).to(tl.uint8)


@triton.jit
def round_to_int8(value):
    """float32 within [-127, 127] to the nearest int8, halves upwards."""
    return tl.floor(value + 0.5).to(tl.int8)


@triton.jit
def philox(c0, c1, c2, k0, k1):
    """The first word of Philox4x32-10 for counter (c0, c1, c2, 0), as `worker.kernels.philox`: uint32."""
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high2, low2 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0


@triton.jit
def gumbel(word):
    """Standard Gumbel noise of a word, as `worker.kernels.philox.gumbel`: float32.

    Logarithms are float64: the GPU's float32 ones are approximations, and would draw other tokens than a CPU.
    """
    uniform = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)
    inner = -tl.log(1.0 - uniform.to(tl.float64))
    return (-tl.log(inner)).to(tl.float32)


@triton.jit
def order_key(value):
    """float32 to uint32 in the same order, -0 as 0 and NaN above everything."""
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(value != value, 0xFFFFFFFF, key).to(tl.uint32)


@triton.jit
def key_value(key):
    """The float32 that `order_key` made `key` of."""
    bits = tl.where((key >> 31) == 1, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)
