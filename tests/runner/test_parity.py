"""The model against transformers, in float32, teacher-forced: logits within 1e-4 at a spread of at least 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.models import write_random_qwen2, write_random_qwen3
from tests.helpers.steps import chunk, logits_of, plan, table
from worker.kernels import choose_kernels
from worker.runner import TorchRunner

TOLERANCE = 1e-4
CPU_BACKENDS = ("cpu", "reference")
POSITIONS = 64

QWEN3_SHAPES = [
    pytest.param({"heads": 2, "kv_heads": 2, "head_dim": 64, "hidden": 96, "tie": True}, id="group1-64"),
    pytest.param({"heads": 4, "kv_heads": 2, "head_dim": 128, "hidden": 128, "tie": False}, id="group2-128"),
    pytest.param({"heads": 4, "kv_heads": 1, "head_dim": 80, "hidden": 160, "tie": True}, id="group4-80"),
    pytest.param({"heads": 5, "kv_heads": 1, "head_dim": 96, "hidden": 64, "tie": False}, id="group5-96"),
]
QWEN2_SHAPES = [
    pytest.param({"heads": 7, "kv_heads": 1, "hidden": 448, "tie": True}, id="group7-64"),
    pytest.param({"heads": 2, "kv_heads": 1, "hidden": 256, "tie": False}, id="group2-128"),
    pytest.param({"heads": 10, "kv_heads": 2, "hidden": 800, "tie": True}, id="group5-80"),
]


def oracle(folder: Path) -> Callable[[list[int]], Tensor]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()

    def logits(ids: list[int]) -> Tensor:
        with torch.inference_mode():
            out: Tensor = model(torch.tensor([ids])).logits[0]
        return out

    return logits


def random_ids(count: int, seed: int, vocab: int = 512) -> list[int]:
    ids: list[int] = torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def check_parity(folder: Path, backend: str) -> None:
    runner = TorchRunner(folder, num_blocks=160, kernels=choose_kernels(backend).kernels)
    expected_of = oracle(folder)
    prompts = [random_ids(count, seed) for seed, count in enumerate((1, 5, 64, 600))]
    expected = [expected_of(ids) for ids in prompts]
    assert expected[3].std() >= 1.0
    blocks, first = [], 0
    for ids in prompts:
        blocks.append(table(first, len(ids), 16))
        first += len(blocks[-1])
    for ids, own, wanted in zip(prompts, blocks, expected, strict=True):
        got = logits_of(runner, ids, own, [len(ids)])
        assert (got[-POSITIONS:] - wanted[-POSITIONS:]).abs().max() <= TOLERANCE
        assert (got - wanted).abs().max() <= TOLERANCE
    # Everything once more, ragged: the last positions of the long prompts one by one, beside chunks of the others.
    for short in (0, 1):
        logits_of(runner, prompts[short], blocks[short], [600])
    for step in range(POSITIONS):
        at = 600 - POSITIONS + step
        whole = runner.forward_logits(
            plan(
                chunk(prompts[3][at : at + 1], at, blocks[3]),
                chunk(prompts[1], 0, blocks[1]),
                chunk(prompts[2][step : step + 1], step, blocks[2]),
            )
        )
        wanted = torch.cat((expected[3][at : at + 1], expected[1], expected[2][step : step + 1]))
        assert (whole - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", QWEN3_SHAPES)
def test_qwen3_logits_match(tmp_path: Path, shape: dict[str, Any], backend: str) -> None:
    check_parity(write_random_qwen3(tmp_path, seed=3, **shape), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", QWEN2_SHAPES)
def test_qwen2_logits_match(tmp_path: Path, shape: dict[str, Any], backend: str) -> None:
    check_parity(write_random_qwen2(tmp_path, seed=4, **shape), backend)


def test_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    ids = random_ids(40, 1)
    one = TorchRunner(write_random_qwen3(tmp_path / "one", tie=False), num_blocks=8)
    many = TorchRunner(write_random_qwen3(tmp_path / "many", tie=False, shards=3), num_blocks=8)
    assert torch.equal(logits_of(one, ids, table(0, 40, 16), [40]), logits_of(many, ids, table(0, 40, 16), [40]))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"rope_theta": 10_000.0, "rope_scaling": YARN}, id="older-fields"),
        pytest.param({"rope_parameters": {"rope_theta": 5_000_000.0, **YARN}}, id="transformers-5"),
        pytest.param(
            {"rope_parameters": {"rope_theta": 1e6, **YARN, "attention_factor": 1.3, "beta_fast": 16}}, id="set"
        ),
    ],
)
def test_yarn_matches(tmp_path: Path, config: dict[str, Any]) -> None:
    write_random_qwen3(tmp_path, max_positions=512, config=config)
    runner = TorchRunner(tmp_path, num_blocks=32)
    assert runner.config.max_positions == 512
    ids = random_ids(400, 2)
    assert (logits_of(runner, ids, table(0, 400, 16), [400]) - oracle(tmp_path)(ids)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("window", [5, 300])
@pytest.mark.parametrize("write", [write_random_qwen2, write_random_qwen3])
def test_sliding_window_matches(tmp_path: Path, write: Callable[..., Path], window: int) -> None:
    write(tmp_path, layers=3, config={"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1})
    runner = TorchRunner(tmp_path, num_blocks=64)
    assert runner.config.windows == (None, window, window)
    ids = random_ids(700, 5)
    expected = oracle(tmp_path)(ids)
    blocks = table(0, 700, 16)
    assert (logits_of(runner, ids, blocks, [700]) - expected).abs().max() <= TOLERANCE
    assert (logits_of(runner, ids, blocks, [650, 1]) - expected).abs().max() <= TOLERANCE
