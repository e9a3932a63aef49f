"""What `make test-gpu` runs, on a device that is a CPU; and that without a GPU it and `make bench-gpu` say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu_bench, gpu_check
from benchmarks.gpu_bench import VLLM, CardLimits, figures, table, with_vllm
from benchmarks.gpu_check import Finding, check_kernels, check_model, report
from qwire.service.config import ConfigError
from tests.helpers.cuda import Rerun, plain_kernels
from tests.helpers.flash import installed
from tests.helpers.models import write_random_qwen3
from worker.bench import Case
from worker.config import WorkerConfig
from worker.kernels.cuda import flash
from worker.kernels.cuda.flash import FlashAttention
from worker.runner.cuda import CudaRunner, CudaSettings


@pytest.fixture(params=["plain", "flash_attn"])
def attention(request: pytest.FixtureRequest) -> Iterator[FlashAttention | None]:
    if request.param == "plain":
        yield None
    else:
        with installed(request.param):
            yield flash.load(request.param)


def test_the_checks_hold(attention: FlashAttention | None) -> None:
    kernels = plain_kernels(Rerun, attention)
    findings = [*check_kernels(kernels, torch.float16), *check_model(kernels, torch.float16, 24)]
    assert "0 wrong" in report(findings), report(findings)
    assert len(findings) > 15


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = plain_kernels(Rerun)
    monkeypatch.setattr(kernels, "silu_mul", lambda gate_up: gate_up[:, : gate_up.shape[1] // 2])
    wrong = [finding.name for finding in check_kernels(kernels, torch.bfloat16) if not finding.good]
    assert wrong == ["silu_mul"]
    assert not Finding("nothing", float("nan"), 1.0).good


@pytest.mark.parametrize("command", [gpu_check.main, gpu_bench.main], ids=["check", "bench"])
def test_without_a_gpu(command: click.Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 2
    assert "nothing was" in result.stderr and "CUDA" in result.stderr


def test_the_benchmarks_table(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path, heads=4, kv_heads=2, head_dim=16, hidden=64, vocab=128)
    runner = CudaRunner(folder, kernels=plain_kernels(Rerun), settings=CudaSettings(max_running=2), num_blocks=16)
    runner.make_ready()
    row = figures(runner, Case(2, 20, 6), CardLimits(1e12, 1e14))
    assert row.prefill_tok_s > 0 and row.decode_tok_s > 0 and 0 < row.decode_bandwidth_share < 1
    (beside,) = with_vllm([row], [(0.5, 0.25)])
    assert (beside.vllm_prefill_tok_s, beside.vllm_decode_tok_s) == (80.0, 8.0)
    assert table([row]).count("-") == 2
    assert table([beside]).splitlines()[1].split()[-1] == "8"
    compile(VLLM, "vllm", "exec")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"isa": "avx2", "backend": "cuda"}, "--isa: avx2 is for the cpu kernels, and --backend says cuda"),
        ({"gpu_memory_utilization": 1.5}, r"--gpu-memory-utilization: must be in \(0, 1\], not 1.5"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        WorkerConfig(model=Path(), **settings)
