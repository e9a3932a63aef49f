"""Quantized weights: their error against llama.cpp's formats, their layout, and odd values."""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.kernels.calibrated import quantize_for
from worker.kernels.quantized import GROUP, Format, bits_per_weight, dequantize, groups, quantize

FORMATS = st.sampled_from(["int8", "int4"])
PEERS = {"int8": (gguf.GGMLQuantizationType.Q8_0, 8.5), "int4": (gguf.GGMLQuantizationType.Q4_1, 5.0)}


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_error_is_within_ggufs_at_equal_bits(format: Format, shape: tuple[int, int]) -> None:  # noqa: A002
    """Gaussian weights of the 0.6B model's shapes; a bit more halves the error."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul_(0.03)[:512]
    kind, bits = PEERS[format]
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    allowed = relative_error(theirs, weight) * 2 ** (bits - bits_per_weight(format))
    assert relative_error(dequantize(quantize(weight, format)), weight) <= allowed


def test_int4_is_better_than_q4_1_in_fewer_bits() -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(2))
    kind, bits = PEERS["int4"]
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    assert relative_error(dequantize(quantize(weight, "int4")), weight) < 0.96 * relative_error(theirs, weight)
    assert bits_per_weight("int4") < bits


@settings(max_examples=25, deadline=None)
@given(FORMATS, st.integers(1, 9), st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_layout(format: Format, rows: int, size: int, dtype: torch.dtype) -> None:  # noqa: A002
    weight = torch.randn(rows, size).to(dtype)
    whole = quantize(weight, format)
    assert (whole.out_features, whole.in_features) == (rows, size)
    assert whole.q.shape == (rows, size if format == "int8" else (size + 1) // 2)
    assert whole.scale.shape == (rows, groups(format, size)) and whole.scale.dtype == torch.bfloat16
    back = dequantize(whole)
    assert back.shape == (rows, size) and back.dtype == torch.float32
    # No value is off by more than two steps: the search may cut an int4 group's extremes.
    step = whole.scale.to(torch.float32).repeat_interleave(GROUP[format], 1)[:, :size]
    assert bool(((back - weight.float()).abs() <= step * 2).all())
    # A row is quantized on its own.
    part = quantize(weight[rows // 2 :], format)
    assert torch.equal(dequantize(part), back[rows // 2 :])
    assert torch.equal(dequantize(whole.rows(rows // 2, rows)), back[rows // 2 :])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_odd_values(format: Format) -> None:  # noqa: A002
    size = GROUP[format]
    weight = torch.zeros(5, 2 * size)
    weight[1] = 1e-38
    weight[2] = 3.0
    weight[3, 0] = -7.0
    weight[4] = torch.linspace(1e30, -1e30, 2 * size)
    made = quantize(weight, format)
    back = dequantize(made)
    assert bool(torch.isfinite(back).all())
    assert bool((made.scale.float() > 1e-35).all()), "a scale is subnormal, or near it"
    assert bool((back[:2].abs() < 1e-28).all())
    error = (back - weight).abs().amax(1)
    assert bool((error <= weight.abs().amax(1) * {"int8": 0.005, "int4": 0.07}[format] + 1e-28).all())


def correlated_rows(size: int) -> torch.Tensor:
    """Rows as layers see them: far fewer directions than features, and some features much larger than others."""
    generator = torch.Generator().manual_seed(3)
    few = torch.randn(2000, size // 4, generator=generator) @ torch.randn(size // 4, size, generator=generator)
    return (few + torch.randn(2000, size, generator=generator)) * torch.rand(size, generator=generator).square()


@pytest.mark.parametrize("size", [160, 200, 70])
def test_calibrated_weights_err_less_on_rows_like_those_seen(size: int) -> None:
    weight = torch.randn(64, size, generator=torch.Generator().manual_seed(4)).bfloat16()
    seen, rows = torch.split(correlated_rows(size), 1000)
    made = quantize_for(weight, seen.t() @ seen)

    def error(quantized: torch.Tensor) -> float:
        return relative_error(rows @ quantized.t(), rows @ weight.float().t())

    assert error(dequantize(made)) < 0.7 * error(dequantize(quantize(weight, "int4")))
    plain = quantize(weight, "int4")
    assert (made.q.shape, made.scale.shape, made.scale.dtype) == (plain.q.shape, plain.scale.shape, torch.bfloat16)
    assert made.zero is not None and int(made.zero.max()) <= 15
    assert not bool((made.scale.view(torch.int16) & 15).any()), "an int4 scale's low bits hold the zero point"


def test_moments_that_say_nothing() -> None:
    weight = torch.randn(8, 64)
    for moments in (torch.zeros(64, 64), torch.full((64, 64), torch.nan), torch.full((64, 64), torch.inf)):
        assert torch.equal(quantize_for(weight, moments).q, quantize(weight, "int4").q)
    one = torch.zeros(64, 64)
    one[5, 5] = 1.0
    made = dequantize(quantize_for(weight, one))
    assert bool(torch.isfinite(made).all()) and relative_error(made, weight) < 0.2
