"""flash-attn by contract: what is called takes what it is given, by the signatures of its sources, and attention by it
is the reference's."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.helpers.cuda import Rerun, plain_kernels
from tests.helpers.flash import installed
from tests.helpers.flash.signatures import SIGNATURES, Signature
from worker.kernels import KVCache, RaggedBatch, ReferenceKernels
from worker.kernels.cuda import CudaError, CudaOptions, flash, open_kernels
from worker.kernels.cuda.flash import FlashError

MODULES = ("flash_attn", "flash_attn_interface", "flash_attn.cute")


def without_annotations(function: Callable[..., object]) -> str:
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    return str(inspect.Signature(parameters))[1:-1]


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda s: f"{s.module}.{s.function} of {s.archive}")
def test_the_stand_ins_have_the_real_signatures(signature: Signature) -> None:
    with installed(signature.module):
        found = getattr(importlib.import_module(signature.module), signature.function)
        assert without_annotations(found) == signature.arguments
        flash.load(signature.module)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 7, 1, 12)], ids=["decode", "mixed"])
def test_attention_is_the_references(
    module: str, window: int | None, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    with installed(module):
        found = flash.load(module)
        size = max(found.default_block_size, 4) if found.block_multiple > 1 else 4
        kernels = plain_kernels(Rerun, attention=found)
        starts = np.array([3, 0, 11, 9][: len(lengths)])
        counts = np.array(lengths)
        blocks = [-(-int(end) // size) for end in starts + counts]
        first = np.cumsum([0, *blocks])
        tables = [np.arange(first[i], first[i + 1])[::-1].copy() for i in range(len(lengths))]
        shape = (2, int(first[-1]) + 1, size, 16)
        cache = KVCache(*(torch.randn(shape, generator=generator).to(dtype) for _ in range(2)))
        queries = torch.randn(int(counts.sum()), 4, 16, generator=generator).to(dtype)
        batch = RaggedBatch(starts, counts, tables, shape[1], size)
        got = kernels.paged_attention(queries, cache, kernels.plan_attention(batch, 2, [window]), window)
        oracle = ReferenceKernels()
        expected = oracle.paged_attention(queries, cache, oracle.plan_attention(batch, 2, [window]), window)
    assert got.dtype == dtype
    assert (got.float() - expected.float()).abs().max() < (0.004 if dtype == torch.float16 else 0.03)


def test_which_package_serves_which_gpu() -> None:
    def chosen(capability: tuple[int, int], module: str) -> str:
        with installed(module):
            try:
                return flash.find(capability, torch.bfloat16, torch.bfloat16, 128).name
            except FlashError as error:
                return str(error)

    assert chosen((8, 0), "flash_attn") == "flash-attn 2.8.3"
    assert chosen((9, 0), "flash_attn_interface") == "flash-attn-3 3.0.0"
    assert chosen((9, 0), "flash_attn") == "flash-attn 2.8.3"
    assert chosen((10, 0), "flash_attn.cute") == "flash-attn-4 4.0.0b36"
    assert "flash-attn is not installed" in chosen((8, 0), "flash_attn_interface")
    assert "no kernels for sm_75" in chosen((7, 5), "flash_attn")
    # Where the other package brings the name alone.
    assert "flash_attn.flash_attn_varlen_func is missing" in chosen((12, 0), "flash_attn.cute")


def test_blocks_that_a_package_takes() -> None:
    sizes = {}
    for module in MODULES:
        with installed(module):
            kernels = plain_kernels(Rerun, attention=flash.load(module))
            sizes[module] = (kernels.default_block_size, kernels.block_multiple)
    assert sizes == {"flash_attn": (256, 256), "flash_attn_interface": (16, 1), "flash_attn.cute": (128, 1)}
    assert (plain_kernels().default_block_size, plain_kernels().block_multiple) == (16, 1)


def test_a_model_that_flash_attn_does_not_take() -> None:
    with installed("flash_attn"):
        for dtype, kv_dtype, head_dim, says in (
            (torch.float32, torch.float32, 128, "takes float16 or bfloat16"),
            (torch.bfloat16, torch.float16, 128, "keys as queries"),
            (torch.bfloat16, torch.bfloat16, 100, "heads of multiples of 8 up to 256"),
        ):
            with pytest.raises(FlashError, match=says):
                flash.find((8, 0), dtype, kv_dtype, head_dim)


def test_a_release_with_other_arguments_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    strange = ModuleType("flash_attn")
    strange.flash_attn_with_kvcache = lambda q, k_cache, v_cache, cache_seqlens, block_table, causal: q  # type: ignore[attr-defined]
    strange.flash_attn_varlen_func = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", strange)
    with pytest.raises(FlashError, match="not a release that is known here"):
        flash.load("flash_attn")


def test_without_a_gpu() -> None:
    with pytest.raises(CudaError, match=r"was built without CUDA|torch finds no GPU"):
        open_kernels(CudaOptions())
