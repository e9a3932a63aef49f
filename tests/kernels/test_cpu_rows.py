"""Compiled norms, rotation and activation against the reference, and their independence of the batch and threads."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.native_modules import each_isa, module
from worker.kernels import KVCache, ReferenceKernels
from worker.kernels.cpu.rows import rms_norm, rope_and_cache

REFERENCE = ReferenceKernels()


@each_isa
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 1200), st.booleans())
def test_rms_norm(isa: str, rows: int, size: int, with_residual: bool) -> None:
    x, weight = torch.randn(rows, size), torch.randn(size)
    residual = torch.randn(rows, size) if with_residual else None
    wanted, total = REFERENCE.rms_norm(x, weight, 1e-6, residual)
    got, summed = rms_norm(module(isa), x, weight, 1e-6, residual)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(summed, total)
    last = None if residual is None else residual[-1:]
    assert torch.equal(rms_norm(module(isa), x[-1:], weight, 1e-6, last)[0], got[-1:])
    assert torch.equal(rms_norm(module(isa, 2), x, weight, 1e-6, residual)[0], got)
    # In place: the norm over its input, the sum over the residual.
    if residual is not None:
        again, same = rms_norm(module(isa), x, weight, 1e-6, residual, x, residual)
        assert again is x and same is residual
        assert torch.equal(x, got) and torch.equal(residual, total)


@each_isa
@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([16, 64, 80, 96, 128, 256]),
    st.integers(1, 3),
    st.integers(1, 8),
    st.booleans(),
    st.integers(1, 40),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rope_and_cache(
    isa: str, head_dim: int, kv_heads: int, group: int, norms: bool, tokens: int, dummies: int, dtype: torch.dtype
) -> None:
    rows, q_heads = tokens + dummies, kv_heads * group
    qkv = torch.randn(rows, (q_heads + 2 * kv_heads) * head_dim)
    angles = torch.randn(rows, head_dim // 2)
    slots = torch.randperm(64)[:tokens]
    q_norm, k_norm = (torch.rand(head_dim) + 0.5 if norms else None for _ in range(2))

    def cache(dtype: torch.dtype) -> KVCache:
        return KVCache(*(torch.zeros(kv_heads, 4, 16, head_dim, dtype=dtype) for _ in range(2)))

    exact, mine, shared = cache(torch.float32), cache(dtype), cache(dtype)
    given = (angles.cos(), angles.sin())
    wanted = REFERENCE.rope_and_cache(qkv, *given, exact, slots, q_norm, k_norm, 1e-6)
    got = rope_and_cache(module(isa), qkv, *given, mine, slots, q_norm, k_norm, 1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine.values, exact.values.to(dtype))
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(mine.keys.float(), exact.keys, rtol=step, atol=1e-5)
    again = rope_and_cache(module(isa, 2), qkv, *given, shared, slots, q_norm, k_norm, 1e-6, torch.empty_like(got))
    assert torch.equal(again, got) and torch.equal(shared.keys, mine.keys)
    row = slice(tokens - 1, tokens)
    alone = rope_and_cache(
        module(isa), qkv[row], given[0][row], given[1][row], cache(dtype), slots[row], q_norm, k_norm, 1e-6
    )
    assert torch.equal(alone, got[row])


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_as_torch_rounds_them(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (64, 3 * 16), generator=generator, dtype=torch.int64).to(torch.int32)
    qkv = bits.view(torch.float32)  # all sorts: denormals, infinities, NaN
    special = torch.tensor([65504.0, 65519.0, 65520.0, 6.1e-5, 5.96e-8, 2.98e-8, 2.99e-8, -0.0, torch.inf, torch.nan])
    qkv[0, 32:42] = special
    cache = KVCache(*(torch.zeros(1, 4, 16, 16, dtype=dtype) for _ in range(2)))
    half = torch.zeros(64, 8)
    rope_and_cache(module(isa), qkv, half, half, cache, torch.arange(64), None, None, 1e-6)
    wanted, got = qkv[:, 32:].to(dtype), cache.values.view(64, 16)
    assert torch.equal(wanted.isnan(), got.isnan())
    assert torch.equal(wanted.nan_to_num(nan=0.0).view(torch.int16), got.nan_to_num(nan=0.0).view(torch.int16))


@each_isa
@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([16, 64, 80, 128]),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(-30, 30),
    st.sampled_from([torch.int8, torch.int16]),
)
def test_a_cache_of_codes_is_the_reference_s(
    isa: str, head_dim: int, kv_heads: int, tokens: int, power: int, dtype: torch.dtype
) -> None:
    qkv = torch.randn(tokens, 3 * kv_heads * head_dim) * 2.0**power
    qkv[0, -head_dim:] = 0.0
    qkv[-1, -head_dim] = torch.inf
    angles, slots = torch.randn(tokens, head_dim // 2), torch.randperm(64)[:tokens]
    shape = (kv_heads, 4, 16, head_dim)
    caches = []
    for kernels in (REFERENCE.rope_and_cache, partial(rope_and_cache, module(isa))):
        pools = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        caches.append(KVCache(*pools, scales=(torch.zeros(shape[:3]), torch.zeros(shape[:3]))))
        kernels(qkv, angles.cos(), angles.sin(), caches[-1], slots, None, None, 1e-6)
    (_, *wanted), (_, *got) = ((cache.keys, cache.values, *(cache.scales or ())) for cache in caches)
    for theirs, ours in zip(wanted[1:], got[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0, equal_nan=True)
        assert ours.isnan().any() == (theirs is wanted[2])
    finite = ~wanted[2].isnan()
    # Products with 1 / scale and quotients differ in the last bit, so a tie may fall either way.
    differ = (got[0].int() - wanted[0].int())[finite].abs()
    assert differ.max() <= 1
    assert differ.float().mean() < (1e-3 if dtype == torch.int8 else 1e-2)


def test_what_they_refuse() -> None:
    native = module("portable")
    x = torch.zeros(2, 32)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(native, x, torch.zeros(31), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        rms_norm(native, x, torch.zeros(32), 1e-6, torch.zeros(2, 32, dtype=torch.bfloat16))
    cache = KVCache(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))
    half = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="can't split"):
        rope_and_cache(native, x, half, half, cache, torch.arange(2), None, None, 1e-6)
    with pytest.raises(ValueError, match="slot"):
        rope_and_cache(native, torch.zeros(2, 48), half, half, cache, torch.arange(3), None, None, 1e-6)
