"""Pipeline parallelism by real processes: the tokens of one stage, and a group that lives or dies as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.stacks import eventually, running_stack, write_tiny_model
from tests.system.test_tensor_parallel import PROMPTS, SMALL, answer, answers, gone, ranks_of, served_again

LONG = [(11 * i) % 250 for i in range(400)]
"""Several parts of a step."""
SHAPE: dict[str, Any] = {"heads": 4, "kv_heads": 2}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_stages_give_the_tokens_of_one(tmp_path: Path, backend: str) -> None:
    model = write_tiny_model(tmp_path / "tiny", **SHAPE)
    prompts = [*PROMPTS, LONG]
    tokens, numerics = {}, set()
    for tp, pp in ((1, 1), (1, 2), (2, 1), (2, 2)):
        flags = (*SMALL, "--backend", backend, "--tp", str(tp), "--pp", str(pp))
        with running_stack(model, "tiny", worker_flags=flags) as stack, stack.client() as client:
            greedy = [answer(client, prompt) for prompt in prompts]
            assert answers(client, prompts) == greedy
            seeded = answers(client, prompts, temperature=1.0, seed=5, repetition_penalty=1.3)
            scored = client.generate_once(
                token_ids=LONG, max_tokens=1, ignore_eos=True, temperature=0, prompt_logprobs=1
            )
            tokens[tp, pp] = greedy, seeded, [entry.drawn.logprob for entry in scored.prompt_logprobs]
            numerics.add(client.model().numerics_id)
            assert len(ranks_of(stack.pids["worker-0"])) == tp * pp
    assert tokens[1, 2] == tokens[1, 1]
    assert tokens[2, 2] == tokens[2, 1]
    assert len(tokens[1, 1][2]) == len(LONG) - 1
    assert len(numerics) == 4


def test_more_stages_than_layers_are_a_wrong_setting(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny", **SHAPE)
    argv = [sys.executable, "-m", "worker", "serve", "--model", str(model), "--listen", "127.0.0.1:0", "--pp", "9"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "--pp: num_hidden_layers, 2, cannot be cut into 9 stages" in result.stderr


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_stage_takes_its_group_and_another_serves(tmp_path: Path, sign: signal.Signals) -> None:
    model = write_tiny_model(tmp_path / "tiny", **SHAPE)
    flags = (*SMALL, "--pp", "2", "--collective-timeout", "2")
    with (
        running_stack(model, "tiny", worker_flags=flags, router_flags=("--worker-wait", "0.2")) as stack,
        stack.client() as client,
    ):
        before = ranks_of(stack.pids["worker-0"])
        expected = answer(client, PROMPTS[1])
        os.kill(before[1], sign)
        assert eventually(lambda: all(gone(pid) for pid in before), 8)
        assert served_again(client, 10)
        assert answer(client, PROMPTS[1]) == expected
