"""The cuda backend in a worker, on a device that is a CPU: real processes, stand-ins for flash-attn, our own kernels in
Triton's interpreter, and the tokens of the reference. And what a machine without a GPU is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from qwire import Client
from qwire.stack import Commands
from tests.helpers.cuda_worker import CAPABILITY
from tests.helpers.flash import path_of
from tests.helpers.stacks import RunningStack, running_stack, write_tiny_model
from tests.helpers.steps import greedy, table
from worker.kernels import ReferenceKernels
from worker.runner import TorchRunner

ROOT = Path(__file__).parents[2]
# Steps of few tokens: the interpreter takes its time, and a step of over ten seconds counts as stuck.
SMALL = ("--kv-cache-mib", "64", "--max-running", "4", "--max-step-tokens", "16", "--speculation", "0")
PROMPTS = [[(13 * index + 7 * i) % 250 for i in range(5 + 10 * index)] for index in range(4)]
NEW = 6
DEVICES = {"flash_attn": ("8.0", 256), "flash_attn_interface": ("9.0", 16)}
"""By module, a GPU that it is the best for, and the block size that it likes."""
NAMES = {"flash_attn": "flash-attn 2.8.3", "flash_attn_interface": "flash-attn-3 3.0.0"}


def answers(client: Client) -> list[list[int]]:
    def answer(prompt: list[int]) -> list[int]:
        generation = client.generate(token_ids=prompt, max_tokens=NEW, ignore_eos=True, temperature=0)
        return generation.read().token_ids

    alone = [answer(prompt) for prompt in PROMPTS[:1]]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, PROMPTS))
    assert together[:1] == alone
    return together


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", heads=4, kv_heads=2, dtype="float16")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    torch.set_num_threads(1)
    runner = TorchRunner(model, num_blocks=16, kernels=ReferenceKernels())
    return [greedy(runner, prompt, NEW, table(0, len(prompt) + NEW, 16)) for prompt in PROMPTS]


@contextmanager
def serving(
    model: Path, *flags: str, packages: str = "", capability: str = "8.0"
) -> Iterator[tuple[RunningStack, Client]]:
    """A stack whose worker has the cuda backend on a device that is a CPU.

    Args:
        packages: a folder of stand-ins for packages.
    """
    path = f"{packages}:{ROOT}" if packages else str(ROOT)
    environ = [f"PYTHONPATH={path}", f"{CAPABILITY}={capability}", "TRITON_INTERPRET=1"]
    commands = Commands(worker=("env", *environ, sys.executable, "-m", "tests.helpers.cuda_worker"))
    with (
        running_stack(model, "tiny", worker_flags=(*SMALL, "--backend", "cuda", *flags), commands=commands) as stack,
        stack.client() as client,
    ):
        yield stack, client


def refused(model: Path, *flags: str, module: str = "worker", environ: Mapping[str, str] | None = None) -> str:
    """What a worker says to wrong settings.

    Args:
        environ: besides this process's.
    """
    argv = [sys.executable, "-m", module, "serve", "--model", str(model), "--listen", "127.0.0.1:0", *flags]
    whole = {**os.environ, **(environ or {})}
    result = subprocess.run(argv, capture_output=True, text=True, timeout=100, env=whole)
    assert result.returncode == 2
    return result.stderr


@pytest.mark.parametrize("module", DEVICES)
def test_flash_attn_serves(model: Path, expected: list[list[int]], module: str) -> None:
    capability, block_size = DEVICES[module]
    with serving(model, packages=str(path_of(module)), capability=capability) as (stack, client):
        assert answers(client) == expected
        assert any("backend cuda" in line and f"attention by {NAMES[module]}" in line for line in stack.lines)
        assert any(f"KV blocks of {block_size} (" in line for line in stack.lines)


def test_stages_on_gpus(model: Path, expected: list[list[int]]) -> None:
    """Steps as graphs, in which stages hand on; what NCCL would carry goes by gloo here."""
    with serving(model, "--pp", "2") as (stack, client):
        assert answers(client) == expected
        assert any("graphs for 1, 2, 4 rows" in line for line in stack.lines)


def test_keys_and_values_in_fp8(model: Path, expected: list[list[int]]) -> None:
    with serving(model, "--kv-dtype", "fp8") as (stack, client):
        got = client.generate(token_ids=PROMPTS[1], max_tokens=NEW, ignore_eos=True, temperature=0).read().token_ids
        assert got[0] == expected[1][0] and len(got) == NEW  # codes of 8 bits round: later ones may be others
        assert any("KV torch.float8_e4m3fn" in line for line in stack.lines)


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
def test_fp8_is_for_gpus(model: Path, backend: str) -> None:
    told = refused(model, "--backend", backend, "--kv-dtype", "fp8")
    assert "--kv-dtype: fp8 is for the cuda kernels; the " in told


def test_codes_of_16_bits_are_not(model: Path) -> None:
    environ = {CAPABILITY: "8.0", "TRITON_INTERPRET": "1"}
    flags = "--backend", "cuda", "--kv-dtype", "int16"
    told = refused(model, *flags, module="tests.helpers.cuda_worker", environ=environ)
    assert "--kv-dtype: int16 is for the cpu and reference kernels; the cuda kernels have bfloat16" in told


def test_what_a_machine_without_a_gpu_is_told(model: Path) -> None:
    told = refused(model, "--backend", "cuda")
    assert "--backend: " in told
    assert "was built without CUDA" in told or "torch finds no GPU" in told
    assert "Traceback" not in told
