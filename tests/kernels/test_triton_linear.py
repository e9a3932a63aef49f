"""Products in Triton against float64 over what the weights stand for, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.interpreter import TOLERANCE
from worker.kernels.cuda import triton as kernels
from worker.kernels.quantized import Format, dequantize, quantize

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest error, in tolerances of results of the wanted ones' size."""
    size = max(1.0, float(wanted.abs().max()))
    return float((got.double() - wanted).abs().max()) / size / TOLERANCE[str(got.dtype)]


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([1, 3, 17, 70]),
    st.integers(1, 300),
    st.integers(1, 150),
    st.sampled_from([None, "int8", "int4"]),
    st.booleans(),
    st.booleans(),
    DTYPES,
)
def test_linear(
    rows: int, inner: int, outer: int, form: Format | None, has_bias: bool, fixed: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows + inner)
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    plain = torch.randn(outer, inner, generator=generator).to(dtype)
    bias = torch.randn(outer, generator=generator).to(dtype) if has_bias else None
    coded = None if form is None else quantize(plain, form)
    weight = plain if coded is None else dequantize(coded).to(dtype)
    got = kernels.linear(x, plain if coded is None else kernels.Codes.of(coded), bias, fixed=fixed)
    wanted = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert got.dtype == dtype and error(got, wanted) <= 1
    if fixed:
        assert torch.equal(
            kernels.linear(x[-1:].contiguous(), plain if coded is None else kernels.Codes.of(coded), bias, fixed=True)[
                0
            ],
            got[-1],
        )


def _words(values: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Eight values of 4 bits a word, [rows, columns * 8] to int32 [rows, columns]: nibble i is value `order[i]`."""
    eights = values.long().view(values.shape[0], -1, 8)[..., order]
    words: torch.Tensor = (eights << torch.arange(0, 32, 4)).sum(-1)
    return words.to(torch.uint32).view(torch.int32)


@pytest.mark.parametrize("form", ["awq", "gptq", "gptq_v2"])
@pytest.mark.parametrize("group", [32, 128])
def test_layouts_of_others(form: str, group: int) -> None:
    """Weights packed as AutoAWQ and AutoGPTQ pack them, against what the papers say that they stand for."""
    inner, outer = 256, 24
    generator = torch.Generator().manual_seed(group)
    values = torch.randint(16, (inner, outer), generator=generator)
    zeros = torch.randint(1, 16, (inner // group, outer), generator=generator)
    scales = torch.rand(inner // group, outer, generator=generator).half()
    weight = (values - zeros.repeat_interleave(group, 0)) * scales.double().repeat_interleave(group, 0)
    if form == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        codes = kernels.from_awq(_words(values, order), _words(zeros, order), scales)
    else:
        less = form == "gptq"
        packed = _words(values.t().contiguous(), list(range(8))).t().contiguous()
        groups = torch.arange(inner) // group
        codes = kernels.from_gptq(
            packed, _words(zeros - int(less), list(range(8))), scales, groups, zeros_less_one=less
        )
        with pytest.raises(ValueError, match="desc_act"):
            kernels.from_gptq(packed, _words(zeros, list(range(8))), scales, groups.flip(0), zeros_less_one=less)
    x = torch.randn(3, inner, generator=generator).half()
    assert error(kernels.linear(x, codes, None), x.double() @ weight) <= 1
    assert error(kernels.linear(x.float(), codes, None), x.double() @ weight) <= 1


def test_groups_that_no_launch_takes_are_refused() -> None:
    words = torch.zeros(96, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="groups"):
        kernels.from_awq(words, torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 8))


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(4, 7),
    st.integers(1, 150),
    st.integers(1, 80),
    st.booleans(),
    DTYPES,
)
def test_experts(
    rows: int, top_k: int, experts: int, inner: int, outer: int, crowded: bool, dtype: torch.dtype
) -> None:
    """Up and down again, as a layer does: shared rows in, slots of their own out, and their sum."""
    generator = torch.Generator().manual_seed(inner)
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    up = torch.randn(experts, outer, inner, generator=generator).to(dtype)
    down = torch.randn(experts, inner, outer, generator=generator).to(dtype)
    scores = torch.rand(rows, experts, generator=generator)
    chosen = torch.arange(top_k).expand(rows, -1) if crowded else scores.topk(top_k).indices
    shares = torch.rand(rows * top_k, generator=generator)
    plan = kernels.plan_experts(chosen, experts)
    slots = kernels.expert_linear(x, up, plan, None, torch.empty(rows * top_k, outer, dtype=dtype))
    flat = chosen.flatten()
    wanted = torch.einsum("rk,rnk->rn", x.double().repeat_interleave(top_k, 0), up.double()[flat])
    assert error(slots, wanted) <= 1
    back = kernels.expert_linear(slots, down, plan, shares, torch.empty(rows * top_k, inner, dtype=dtype))
    wanted = torch.einsum("rk,rnk->rn", slots.double(), down.double()[flat]) * shares.double()[:, None]
    assert error(back, wanted) <= 1
    out = kernels.combine_experts(back, torch.empty(rows, inner, dtype=dtype))
    assert error(out, back.double().view(rows, top_k, inner).sum(1)) <= 1
