"""Compiled selection over a vocabulary against sorting it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.native_modules import each_isa, module
from worker.kernels.cpu.select import NativeSelection, argmax, top_values, total_mass
from worker.kernels.interface import SamplingBatch
from worker.kernels.reference.logits import logprobs
from worker.kernels.reference.sampling import sample

SIZES = st.sampled_from([1, 2, 15, 16, 17, 1000, 8191, 8193, 20_000])


def logits_of(rows: int, size: int, grid: float, seed: int) -> Tensor:
    """With many ties where `grid` isn't 0, and infinities and NaN here and there."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=generator) * 3
    if grid:
        logits = (logits / grid).round() * grid  # -0.0 among them
    odd = torch.rand(rows, size, generator=generator)
    logits[odd < 0.1] = -torch.inf
    if seed % 3 == 0:
        logits[odd > 0.9999] = torch.nan
        logits[odd.gt(0.9995) & odd.lt(0.9999)] = torch.inf
    return logits


def in_order(logits: Tensor) -> Tensor:
    """Ids by value falling, then id rising, NaN first."""
    keys = torch.where(logits.isnan(), torch.inf, logits.double().clamp(-1e300, 1e300))
    return keys.sort(dim=-1, descending=True, stable=True).indices


@each_isa
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), SIZES, st.sampled_from([0.0, 0.5, 100.0]), st.integers(0, 99), st.integers(1, 2))
def test_argmax(isa: str, rows: int, size: int, grid: float, seed: int, threads: int) -> None:
    logits = logits_of(rows, size, grid, seed)
    assert torch.equal(argmax(module(isa, threads), logits), in_order(logits)[:, 0])


@each_isa
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    SIZES,
    st.sampled_from([1, 2, 64, 1024, 8192]),
    st.sampled_from([0.0, 0.5, 100.0]),
    st.integers(0, 99),
    st.integers(1, 2),
)
def test_top_values(isa: str, rows: int, size: int, count: int, grid: float, seed: int, threads: int) -> None:
    count = min(count, size)
    logits = logits_of(rows, size, grid, seed)
    values, ids = top_values(module(isa, threads), logits, count)
    wanted = in_order(logits)[:, :count]
    assert torch.equal(ids, wanted)
    assert torch.equal(values.nan_to_num(nan=9e9), logits.gather(1, wanted).nan_to_num(nan=9e9))


@each_isa
def test_a_whole_vocabulary(isa: str) -> None:
    logits = torch.randn(3, 151_936, generator=torch.Generator().manual_seed(0))
    logits[1] = 0.0
    logits[2] = -torch.inf
    native = module(isa, 2)
    assert argmax(native, logits).tolist() == [int(logits[0].argmax()), 0, 0]
    for count in (1, 64, 1024, 8192):
        values, ids = top_values(native, logits, count)
        assert torch.equal(values[0], logits[0].topk(count).values)
        assert torch.equal(ids[1], torch.arange(count)) and torch.equal(ids[2], torch.arange(count))
        assert torch.equal(top_values(native, logits[:1], count)[1], ids[:1])


@each_isa
def test_total_mass(isa: str) -> None:
    logits = torch.randn(3, 50_001, generator=torch.Generator().manual_seed(0)) * 4
    logits[1, 100:] = -torch.inf
    peaks = logits.amax(-1)
    got = total_mass(module(isa), logits, peaks)
    torch.testing.assert_close(got, torch.exp(logits.double() - peaks.double()[:, None]).sum(-1), rtol=1e-6, atol=0)
    assert torch.equal(total_mass(module(isa, 2), logits, peaks), got)
    assert torch.equal(total_mass(module(isa, 2), logits[2:], peaks[2:]), got[2:])


def test_what_they_refuse() -> None:
    native = module("portable")
    with pytest.raises(ValueError, match="contiguous"):
        argmax(native, torch.zeros(2, 8)[:, :4])
    with pytest.raises(ValueError, match="count"):
        top_values(native, torch.zeros(2, 8), 9)
    with pytest.raises(ValueError, match="peaks"):
        total_mass(native, torch.zeros(2, 8), torch.zeros(3))


@each_isa
def test_drawing_is_the_same_with_either_selection(isa: str) -> None:
    count = 24
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(count, 30_000, generator=generator) * torch.linspace(0.1, 6, count)[:, None]
    batch = SamplingBatch(
        temperature=np.resize(np.array([0.0, 1.0, 0.7, 2.0, 1.3], np.float32), count),
        top_k=np.resize(np.array([0, 0, 20, 5000]), count),
        top_p=np.resize([1.0, 0.9, 0.999], count),
        min_p=np.resize([0.0, 0.01], count),
        seed=np.arange(count, dtype=np.uint64),
        choice=np.zeros(count, np.int64),
        position=np.arange(count),
    )
    selection = NativeSelection(module(isa, 2))
    drawn = sample(logits.clone(), batch, selection)
    assert torch.equal(drawn, sample(logits.clone(), batch))
    assert torch.equal(sample(logits.clone(), batch, NativeSelection(module(isa))), drawn)
    for mine, wanted in zip(logprobs(logits, drawn, 20, selection), logprobs(logits, drawn, 20), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)
