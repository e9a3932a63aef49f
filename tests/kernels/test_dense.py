"""Linear, norms, activation and rotation against naive float64, and their independence of the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.kernels import pack
from worker.kernels import KVCache, ReferenceKernels
from worker.kernels.reference import dense

KERNELS = ReferenceKernels()
ULP = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = st.sampled_from(list(ULP))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 72), st.integers(1, 200), st.integers(1, 200), st.booleans(), DTYPES, st.integers(0, 9))
def test_linear(rows: int, inner: int, outer: int, has_bias: bool, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    weight = torch.randn(outer, inner, generator=generator).to(dtype)
    bias = torch.randn(outer, generator=generator).to(dtype) if has_bias else None
    prepared = pack(KERNELS, weight, bias)
    got = KERNELS.linear(x, prepared)
    wanted = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert got.dtype == dtype
    assert (got.double() - wanted).abs().max() <= ULP[dtype] * (inner**0.5 + 4) * 4
    # A row's bits: elsewhere in the batch, among zeros.
    moved = torch.zeros(96, inner, dtype=dtype)
    moved[77] = x[-1]
    assert torch.equal(KERNELS.linear(moved, prepared)[77], got[-1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", list(ULP))
@pytest.mark.parametrize(("inner", "outer"), [(1536, 192), (192, 640), (560, 100)])
def test_numbers_of_rows_do_not_matter(inner: int, outer: int, dtype: torch.dtype, threads: int) -> None:
    """Whatever this processor's kernels do: sizes that would give other bits are not used."""
    torch.set_num_threads(threads)
    x = torch.randn(1024, inner).to(dtype)
    prepared = pack(KERNELS, torch.randn(outer, inner).to(dtype), torch.randn(outer).to(dtype))
    wanted = torch.cat([KERNELS.linear(part, prepared) for part in torch.split(x, 32)])
    for start, rows in (
        (0, 1),
        (33, 1),
        (7, 2),
        (70, 3),
        (0, 8),
        (41, 9),
        (8, 16),
        (0, 24),
        (56, 40),
        (8, 64),
        (0, 120),
        (16, 136),
        (8, 512),
        (24, 1000),
    ):
        assert torch.equal(KERNELS.linear(x[start : start + rows], prepared), wanted[start : start + rows])


@pytest.mark.parametrize("dtype", list(ULP))
def test_sizes_with_other_bits_are_not_used(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    product, sizes = dense._product, []

    def flawed(x: torch.Tensor, prepared: dense.ReferenceLinear) -> torch.Tensor:
        """Adds in another order at 8 and 128 rows."""
        sizes.append(len(x))
        if len(x) not in (8, 128):
            return product(x, prepared)
        half = x.shape[1] // 2
        parts = (
            torch.cat((x[:, :half], torch.zeros_like(x[:, half:])), 1),
            torch.nn.functional.pad(x[:, half:], (half, 0)),
        )
        return (product(parts[0], prepared).float() + product(parts[1], prepared).float()).to(x.dtype)

    prepared = pack(KERNELS, torch.randn(192, 384).to(dtype))
    x = torch.randn(136, 384).to(dtype)
    wanted = torch.cat([KERNELS.linear(part, prepared) for part in torch.split(x, 8)])
    monkeypatch.setattr(dense, "_product", flawed)
    monkeypatch.setattr(dense, "_tested", {})
    assert [dense.same_bits(prepared, rows) for rows in (8, 16, 32, 64, 128)] == [False, True, True, True, False]
    sizes.clear()
    assert torch.equal(KERNELS.linear(x, prepared), wanted)
    assert sizes == [64, 64, 16], "the last 8 rows take a padded product"


def test_a_weight_that_shows_no_order_speaks_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_tested", {})
    zeros = pack(KERNELS, torch.zeros(64, 64), torch.randn(64))
    assert dense.same_bits(zeros, 8)
    assert not dense._tested
    dense.same_bits(pack(KERNELS, torch.randn(64, 64), torch.randn(64)), 8)
    assert len(dense._tested) == 1
    # As many outputs as one row needs to be telling, and more.
    dense.same_bits(pack(KERNELS, torch.randn(2**15, 8)), 1)
    assert len(dense._tested) == 2


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 600), st.booleans(), DTYPES)
def test_rms_norm(size: int, with_residual: bool, dtype: torch.dtype) -> None:
    x, residual = torch.randn(64, size).to(dtype), torch.randn(64, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    normed, total = KERNELS.rms_norm(x, weight, 1e-6, residual if with_residual else None)
    summed = x + residual if with_residual else x
    wide = summed.double()
    wanted = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert torch.equal(total, summed)
    assert (normed.double() - wanted).abs().max() <= ULP[dtype] * 4 * wanted.abs().max()
    part, _ = KERNELS.rms_norm(x[32:], weight, 1e-6, residual[32:] if with_residual else None)
    assert torch.equal(part, normed[32:])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 300), DTYPES)
def test_silu_mul(size: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(32, 2 * size) * 5).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    wanted = gate * torch.sigmoid(gate) * up
    got = KERNELS.silu_mul(gate_up)
    assert (got.double() - wanted).abs().max() <= ULP[dtype] * 2 * max(1.0, float(wanted.abs().max()))
    assert torch.equal(KERNELS.silu_mul(gate_up[5:6]), got[5:6])


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([64, 80, 96, 128]), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(1, 32))
def test_rope_and_cache(head_dim: int, kv_heads: int, group: int, norms: bool, tokens: int) -> None:
    q_heads, half = kv_heads * group, head_dim // 2
    qkv = torch.randn(32, (q_heads + 2 * kv_heads) * head_dim)
    angles = torch.randn(32, half)
    cache = KVCache(torch.zeros(kv_heads, 4, 16, head_dim), torch.zeros(kv_heads, 4, 16, head_dim))
    slots = torch.randperm(64)[:tokens]
    query_norm, key_norm = (torch.rand(head_dim) + 0.5 if norms else None for _ in range(2))
    got = KERNELS.rope_and_cache(qkv, angles.cos(), angles.sin(), cache, slots, query_norm, key_norm, 1e-6)
    heads = qkv.double().view(32, -1, head_dim)
    parts = [heads[:, :q_heads], heads[:, q_heads : q_heads + kv_heads]]
    rotated = []
    for part, weight in zip(parts, (query_norm, key_norm), strict=True):
        if weight is not None:
            part = part / (part.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        turned = torch.view_as_complex(torch.stack((part[..., :half], part[..., half:]), -1).contiguous())
        turned = turned * torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
        rotated.append(torch.cat((turned.real, turned.imag), -1))
    torch.testing.assert_close(got.double(), rotated[0], atol=1e-5, rtol=1e-5)
    keys = cache.keys.view(kv_heads, 64, head_dim)[:, slots].transpose(0, 1)
    torch.testing.assert_close(keys.double(), rotated[1][:tokens], atol=1e-5, rtol=1e-5)
    values = cache.values.view(kv_heads, 64, head_dim)
    assert torch.equal(values[:, slots].transpose(0, 1).double(), heads[:tokens, q_heads + kv_heads :])
    untouched = torch.ones(64, dtype=torch.bool)
    untouched[slots] = False
    assert not values[:, untouched].any()
