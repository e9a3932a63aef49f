"""Tensor parallelism by real processes: the tokens of one rank, and a group that lives or dies as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from qwire import Client, QwireError
from tests.helpers.stacks import RunningStack, eventually, running_stack, write_tiny_model

PROMPTS = [[(13 * index + 7 * i) % 250 for i in range(5 + 40 * index)] for index in range(4)]
SHAPES = {"replicated": {"heads": 4, "kv_heads": 1}, "shared-out": {"heads": 6, "kv_heads": 2, "tie": False}}
SMALL = ("--kv-cache-mib", "64")


def answer(client: Client, prompt: list[int], count: int = 24, **more: object) -> list[int]:
    options = {"temperature": 0, **more}
    generation = client.generate(token_ids=prompt, max_tokens=count, ignore_eos=True, bypass=True, **options)  # type: ignore[arg-type]
    return generation.read().token_ids


def answers(
    client: Client, prompts: Sequence[list[int]], count: int = 24, *, at_once: int = 4, **more: object
) -> list[list[int]]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda prompt: answer(client, prompt, count, **more), prompts))


def ranks_of(launcher: int) -> list[int]:
    """Process ids of a worker's ranks, rank 0 first."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def served_again(client: Client, within: float) -> bool:
    def works() -> bool:
        try:
            return len(answer(client, PROMPTS[0], 2)) == 2
        except QwireError:
            return False

    return eventually(works, within)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_ranks_give_the_tokens_of_one(tmp_path: Path, shape: str) -> None:
    model = write_tiny_model(tmp_path / "tiny", **SHAPES[shape])
    got, numerics = [], []
    for tp in ("1", "2"):
        with running_stack(model, "tiny", worker_flags=(*SMALL, "--tp", tp)) as stack, stack.client() as client:
            greedy = [answer(client, prompt) for prompt in PROMPTS]
            seeded = [answer(client, prompt, temperature=1.0, seed=5) for prompt in PROMPTS]
            assert answers(client, PROMPTS) == greedy
            assert answers(client, PROMPTS, temperature=1.0, seed=5) == seeded
            penalties: Any = {"repetition_penalty": 1.3, "frequency_penalty": 0.5}
            forked = client.generate(
                token_ids=PROMPTS[1], n=3, seed=2, temperature=1.0, max_tokens=20, ignore_eos=True, **penalties
            ).read()
            choices = [choice.token_ids for choice in forked.choices.values()]
            assert len({tuple(ids) for ids in choices}) == 3
            got.append((greedy, seeded, choices))
            numerics.append(client.model().numerics_id)
    assert got[0] == got[1]
    assert numerics[0] != numerics[1]


def test_heads_that_do_not_divide_are_a_wrong_setting(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny", heads=4, kv_heads=2)
    argv = [sys.executable, "-m", "worker", "serve", "--model", str(model), "--listen", "127.0.0.1:0", "--tp", "3"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "--tp: num_attention_heads, 4, cannot be shared out over 3 ranks" in result.stderr
    assert "listening" not in result.stdout


def test_a_new_group_keeps_the_port_and_a_drain_ends_all_ranks(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny", heads=4, kv_heads=2)
    argv = [sys.executable, "-m", "worker", "serve", "--model", str(model), "--listen", "127.0.0.1:0", "--tp", "2"]
    with subprocess.Popen([*argv, *SMALL], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first.startswith("listening on 127.0.0.1:") and not first.endswith(":0\n")
            before = ranks_of(process.pid)
            os.kill(before[0], signal.SIGKILL)  # at once: the address must be remembered by now
            assert process.stdout.readline() == first
            after = ranks_of(process.pid)
            assert len(after) == 2 and not set(after) & set(before)
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == ""
            assert process.wait(10) == 0
            assert all(gone(pid) for pid in after)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    model = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", **SHAPES["replicated"])
    flags = (*SMALL, "--tp", "2", "--collective-timeout", "2")
    with running_stack(model, "tiny", worker_flags=flags, router_flags=("--worker-wait", "0.2")) as stack:
        yield stack


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_rank_takes_its_group_and_another_serves(pair: RunningStack, rank: int, busy: bool) -> None:
    with pair.client() as client, ThreadPoolExecutor(1) as pool:
        assert served_again(client, 10)
        launcher = pair.pids["worker-0"]
        before = ranks_of(launcher)
        assert len(before) == 2
        numerics = client.model().numerics_id
        if busy:
            pool.submit(answer, client, PROMPTS[0], 3000)
            time.sleep(0.3)
        killed = time.monotonic()
        os.kill(before[rank], signal.SIGKILL)
        assert eventually(lambda: all(gone(pid) for pid in before), 5)
        died = time.monotonic() - killed
        assert served_again(client, 5)
        took = time.monotonic() - killed
        print(f"rank {rank}, busy {busy}: group gone after {died:.2f} s, serving after {took:.2f} s")
        assert took < 5
        assert pair.pids["worker-0"] == launcher
        assert not set(before) & set(ranks_of(launcher))
        assert client.model().numerics_id == numerics


@pytest.mark.parametrize("busy", [False, True])
def test_a_rank_that_hangs_ends_the_group(pair: RunningStack, busy: bool) -> None:
    with pair.client() as client, ThreadPoolExecutor(1) as pool:
        assert served_again(client, 10)
        before = ranks_of(pair.pids["worker-0"])
        if busy:
            pool.submit(answer, client, PROMPTS[0], 3000)
            time.sleep(0.3)
        os.kill(before[1], signal.SIGSTOP)
        assert eventually(lambda: all(gone(pid) for pid in before), 8)
        assert served_again(client, 10)


def test_a_killed_worker_takes_its_ranks(pair: RunningStack) -> None:
    with pair.client() as client:
        assert served_again(client, 10)
        launcher = pair.pids["worker-0"]
        before = ranks_of(launcher)
        os.kill(launcher, signal.SIGKILL)
        assert eventually(lambda: all(gone(pid) for pid in before), 10)
        assert served_again(client, 20)
        assert pair.pids["worker-0"] != launcher


DEMO_PROMPTS = [
    f"{verb} {what}."
    for verb in ("Describe", "Explain", "Tell me a story about", "List five facts about")
    for what in ("the sea", "the number seven")
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_ranks_give_the_demo_models_tokens(demo_folder: Path) -> None:
    """9 heads and 3 KV heads: three whole groups. Four prompts at once, and one of them alone."""

    def serving(tp: str) -> AbstractContextManager[RunningStack]:
        return running_stack(demo_folder, "demo", worker_flags=("--dtype", "float32", "--tp", tp))

    with serving("1") as stack, stack.client() as client:
        prompts = [list(client.render_chat([{"role": "user", "content": text}]).token_ids) for text in DEMO_PROMPTS]
        expected = answers(client, prompts, 32, at_once=len(prompts))
    with serving("3") as stack, stack.client() as client:
        assert answers(client, prompts, 32) == expected
        assert answer(client, prompts[0], 32) == expected[0]
