"""Steps by our own kernels in Triton's interpreter: the tokens of the reference, and in deterministic mode the same
bits for a row whatever its batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tests.helpers.interpreter  # noqa: F401 - before Triton is imported
from tests.helpers.cuda import CpuDevice, Rerun
from tests.helpers.models import write_random_qwen3
from tests.helpers.steps import chunk, greedy, plan, table
from worker.engine.plan import StepPlan
from worker.kernels import ReferenceKernels
from worker.kernels.cuda import CudaError, CudaKernels, CudaOptions, choose
from worker.runner import TorchRunner
from worker.runner.cuda import CudaRunner, CudaSettings

PROMPT = [(7 * i) % 128 for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_qwen3(
        tmp_path_factory.mktemp("model"), layers=1, heads=2, kv_heads=1, head_dim=16, hidden=32, vocab=128
    )


def kernels(kv_dtype: torch.dtype = torch.float32, **options: bool) -> CudaKernels:
    chosen, why = choose(
        CpuDevice(Rerun), CudaOptions(attention="auto", dtype=torch.float32, kv_dtype=kv_dtype, **options)
    )
    assert "attention by Triton" in why
    return chosen


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_tokens_are_the_references(folder: Path, kv_dtype: str) -> None:
    reference = TorchRunner(folder, num_blocks=2, kv_dtype=kv_dtype, kernels=ReferenceKernels())
    expected = greedy(reference, PROMPT, 4, [0, 1])
    runner = CudaRunner(
        folder,
        kernels=kernels(getattr(torch, kv_dtype)),
        settings=CudaSettings(max_running=1),
        num_blocks=2,
        kv_dtype=kv_dtype,
    )
    runner.make_ready()
    assert greedy(runner, PROMPT, 4, [0, 1]) == expected
    assert {cache.scales is not None for cache in runner.caches} == {kv_dtype == "int8"}


def test_keys_and_values_in_fp8(folder: Path) -> None:
    """No reference has them: logits are near those of float32, and not the same."""
    exact = TorchRunner(folder, num_blocks=2, kernels=ReferenceKernels())
    runner = CudaRunner(
        folder,
        kernels=kernels(torch.float8_e4m3fn),
        settings=CudaSettings(max_running=1),
        num_blocks=2,
        kv_dtype="fp8",
    )
    runner.make_ready()
    for cache in runner.caches:
        assert cache.keys.dtype == cache.values.dtype == torch.float8_e4m3fn and cache.scales is not None
    for step in (plan(chunk(PROMPT[:11], 0, [0])), plan(chunk(PROMPT[11:], 11, [0]))):
        got, wanted = runner.forward_logits(step), exact.forward_logits(step)
        error = (got - wanted).std() / wanted.std()
        assert 0 < error < 0.06  # 3 bits of mantissa round by up to a sixteenth
    # A block that is copied is read as the one that it was copied from.
    more = chunk(PROMPT[11:], 11, [1])
    before = runner.forward_logits(plan(chunk(PROMPT[11:], 11, [0])))
    runner.execute(StepPlan([more], [(0, 1)]))
    assert torch.equal(runner.forward_logits(plan(more)), before)


def test_a_rows_bits_in_deterministic_mode(folder: Path) -> None:
    runner = CudaRunner(folder, kernels=kernels(deterministic=True), settings=CudaSettings(graphs=False), num_blocks=4)
    runner.make_ready()
    whole = runner.forward_logits(plan(chunk(PROMPT, 0, table(0, 12, 16))))
    first = runner.forward_logits(plan(chunk(PROMPT[:5], 0, [2]), chunk(PROMPT[:3], 0, [3])))
    rest = [
        runner.forward_logits(plan(chunk(PROMPT[5:9], 5, [2]), chunk(PROMPT[3:4], 3, [3]))),
        *(runner.forward_logits(plan(chunk(PROMPT[at : at + 1], at, [2]))) for at in range(9, 12)),
    ]
    assert torch.equal(torch.cat((first[:5], rest[0][:4], *rest[1:])), whole)
    assert runner.kernels.batch_invariant


def test_deterministic_attention_is_our_own() -> None:
    with pytest.raises(CudaError, match="--deterministic goes with Triton's attention"):
        choose(CpuDevice(Rerun), CudaOptions(deterministic=True, attention="flash"))
