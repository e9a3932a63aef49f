"""Norms, activation, rotation and cache writes in Triton against the reference, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.interpreter import TOLERANCE
from worker.kernels import KVCache, ReferenceKernels
from worker.kernels.cuda import triton as kernels
from worker.kernels.cuda.triton.rope import cache_format

REFERENCE = ReferenceKernels()
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors of one dtype agree within it."""
    tolerance = TOLERANCE[str(wanted.dtype)]
    return got.dtype == wanted.dtype and torch.allclose(got.double(), wanted.double(), tolerance, tolerance)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.booleans(), DTYPES, st.integers(0, 9))
def test_rms_norm(rows: int, width: int, adds: bool, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(dtype)
    residual = other if adds else None
    wanted = REFERENCE.rms_norm(x.clone(), weight, 1e-6, None if residual is None else residual.clone())
    got = kernels.rms_norm(x, weight, 1e-6, residual)
    assert close(got[1], wanted[1])
    # The norm is of the rounded sum, which the interpreter cuts off: what it should be follows from its own.
    assert close(got[0], REFERENCE.rms_norm(got[1].clone(), weight, 1e-6)[0])


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 48, 200, 1025]), DTYPES)
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)
    out = torch.empty(rows, width, dtype=dtype)
    assert kernels.silu_mul(gate_up, out) is out
    assert close(out, REFERENCE.silu_mul(gate_up))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 7),
    st.sampled_from([64, 80, 96, 128]),
    st.sampled_from([16, 48, 256]),
    st.booleans(),
    st.booleans(),
    DTYPES,
    st.integers(0, 9),
)
def test_rope_and_cache(
    rows: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    normed: bool,
    heads_last: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q_heads, blocks = kv_heads * group, 3
    qkv = torch.randn(rows + 1, (q_heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    cos, sin = torch.randn(2, rows + 1, head_dim // 2, generator=generator)
    norms = torch.randn(2, head_dim, generator=generator).to(dtype)
    q_norm, k_norm = norms if normed else (None, None)
    slots = torch.randperm(blocks * block_size, generator=generator)[:rows]
    shape = (kv_heads, blocks, block_size, head_dim)
    wanted = KVCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
    got = KVCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
    if heads_last:
        # flash-attn's layout, [blocks, block size, K, D], seen as ours.
        pools = (torch.zeros(blocks, block_size, kv_heads, head_dim, dtype=dtype) for _ in range(2))
        got = KVCache(*(pool.permute(2, 0, 1, 3) for pool in pools))
    queries = REFERENCE.rope_and_cache(qkv, cos, sin, wanted, slots, q_norm, k_norm, 1e-6)
    out = torch.empty(rows + 1, q_heads, head_dim, dtype=dtype)
    kernels.rope_and_cache(qkv, cos, sin, got, slots, q_norm, k_norm, 1e-6, out)
    assert close(out, queries)
    assert close(got.keys, wanted.keys)
    assert close(got.values, wanted.values)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_cache_of_eight_bits_holds_values_within_half_a_step(dtype: torch.dtype) -> None:
    kv_heads, head_dim, rows = 2, 64, 3
    qkv = torch.randn(rows, 3 * kv_heads * head_dim, generator=torch.Generator().manual_seed(1)) * 100
    cos, sin = torch.ones(rows, head_dim // 2), torch.zeros(rows, head_dim // 2)
    shape = (kv_heads, 2, 16, head_dim)
    scales = (torch.zeros(shape[:3]), torch.zeros(shape[:3]))
    cache = KVCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), scales=scales)
    slots = torch.tensor([5, -1, 20])
    out = torch.empty(rows, kv_heads, head_dim)
    kernels.rope_and_cache(qkv, cos, sin, cache, slots, None, None, 1e-6, out)
    heads = qkv.view(rows, 3 * kv_heads, head_dim)
    for pool, scale, first in ((cache.keys, scales[0], kv_heads), (cache.values, scales[1], 2 * kv_heads)):
        stored = (pool.float() * scale[..., None]).flatten(1, 2)
        for row, slot in ((0, 5), (2, 20)):
            wanted = heads[row, first : first + kv_heads]
            most = wanted.abs().amax(-1, keepdim=True)
            step = most / 127 if dtype == torch.int8 else torch.maximum(wanted.abs() / 8, most * 2**-15)
            assert ((stored[:, slot] - wanted).abs() <= 0.5001 * step).all()
        assert scale.count_nonzero() == 2 * kv_heads
    with pytest.raises(ValueError, match="scales"):
        kernels.rope_and_cache(
            qkv, cos, sin, KVCache(*(torch.zeros(shape, dtype=torch.int8),) * 2), slots, None, None, 1e-6, out
        )
    assert cache_format(cache)
    codes = KVCache(*(torch.zeros(shape, dtype=torch.int16),) * 2, scales=cache.scales)
    with pytest.raises(ValueError, match="int16 is for CPUs"):
        kernels.rope_and_cache(qkv, cos, sin, codes, slots, None, None, 1e-6, out)


def test_e4m3_without_scales_rounds_as_torch_does() -> None:
    """All exponents, subnormals and ties among them; beyond the greatest code, where torch has NaN, that code."""
    values = torch.cat((torch.randn(64) * 2.0 ** torch.randint(-12, 8, (64,)), torch.arange(-32, 32) / 2048.0))
    values = values.clamp(-440, 440)
    values[0], values[1] = 448.0, 1000.0
    qkv = torch.cat((torch.zeros(256), values))[None]
    shape = (1, 1, 16, 128)
    cache = KVCache(*(torch.zeros(shape, dtype=torch.float8_e4m3fn) for _ in range(2)))
    flat = torch.ones(1, 64)
    kernels.rope_and_cache(qkv, flat, flat, cache, torch.tensor([3]), None, None, 1e-6, torch.empty(1, 1, 128))
    stored = cache.values[0, 0, 3].float()
    assert torch.equal(stored, values.clamp(-448, 448).to(torch.float8_e4m3fn).float())
