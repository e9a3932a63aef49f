"""The worker's kernels as their user chooses them: the start-up line, what is refused, and quantized models served."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.stacks import running_stack, write_tiny_model
from worker.kernels.cpu import native
from worker.quantize import quantize_folder

ROOT = Path(__file__).parents[2]
PROMPT = [(13 * i) % 250 for i in range(40)]
SMALL = ("--kv-cache-mib", "64")


def worker(*argv: str, source: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command of the worker, of the package in the folder `source`."""
    environ = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "worker", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=source, env=environ)


@pytest.fixture(scope="module")
def not_compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker as an install without a compiler leaves it."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "worker", folder / "worker", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def test_quantized_models_are_served(tmp_path: Path) -> None:
    """Quantized while loading, and by `qwire quantize`: the same tokens, and another numerics_id than without."""
    model = write_tiny_model(tmp_path / "tiny", dtype="bfloat16")
    done = worker("quantize", str(model), str(tmp_path / "int8"), "--format", "int8")
    assert done.returncode == 0, done.stderr
    best, _ = native.load()
    answers, numerics = [], []
    for folder, flags in ((model, ()), (model, ("--quantize", "int8")), (tmp_path / "int8", ("--isa", best))):
        with running_stack(folder, "tiny", worker_flags=(*SMALL, *flags)) as stack, stack.client() as client:
            told = client.model()
            numerics.append(told.numerics_id)
            assert told.quantization == ("none" if not flags else "int8")
            assert told.dtype == "bfloat16"
            answers.append(client.generate(token_ids=PROMPT, max_tokens=32, ignore_eos=True, temperature=0).read())
            assert any(f"backend cpu, instruction set {best} " in line for line in stack.lines)
    assert answers[1].token_ids == answers[2].token_ids
    assert len(set(numerics)) == 3


def test_keys_and_values_as_codes(tmp_path: Path) -> None:
    """Of 16 bits by default where they are multiplied in fixed point; of 8 bits nearly twice the blocks in the same
    memory. Near the same log-probabilities, and nobody else's numerics."""
    coded = native.load()[1].fixed_point
    model = write_tiny_model(tmp_path / "tiny", dtype="bfloat16")
    told, answers, blocks = [], [], []
    for kind in ("auto", "bfloat16", "int8"):
        with (
            running_stack(model, "tiny", worker_flags=(*SMALL, "--kv-dtype", kind)) as stack,
            stack.client() as client,
        ):
            told.append(client.model())
            runs = [
                client.generate(token_ids=PROMPT, max_tokens=16, ignore_eos=True, temperature=0, logprobs=1).read()
                for _ in range(2)
            ]
            assert runs[0].token_ids == runs[1].token_ids
            assert runs[1].finished is not None and runs[1].finished.usage.cached_tokens == 39
            answers.append(runs[0].choices[0].logprobs[0].drawn.logprob)
            (loaded,) = [line for line in stack.lines if " loaded tiny in " in line]
            assert f"KV torch.{'int16' if coded and kind == 'auto' else kind.replace('auto', 'bfloat16')}" in loaded
            (line,) = [line for line in stack.lines if "KV blocks of 16" in line]
            blocks.append(int(line.split(": ")[-1].split()[0]))
    assert len({model.numerics_id for model in told}) == 2 + coded
    assert blocks[0] == blocks[1] if not coded else 0.9 < blocks[0] / blocks[1] < 1.0
    assert 1.8 < blocks[2] / blocks[1] < 2.0
    assert answers[1] != answers[2]
    assert abs(answers[0] - answers[1]) < 0.01
    assert abs(answers[1] - answers[2]) < 0.05


def test_calibrated_int4_is_served(tmp_path: Path) -> None:
    """`qwire quantize --text` chooses weights by that text, and the model is served."""
    model = write_tiny_model(tmp_path / "tiny", dtype="bfloat16")
    texts = tmp_path / "text.txt", tmp_path / "other.txt"
    for path, line in zip(texts, ("The harbour froze in January. ", "0x7f, 0x3a, 0x11, "), strict=True):
        path.write_text(line * 20)
    out, other = tmp_path / "int4", tmp_path / "other"
    command = [sys.executable, "-m", "qwire", "quantize", str(model), str(out), "--format", "int4"]
    done = subprocess.run([*command, "--text", str(texts[0])], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    quantize_folder(model, other, "int4", text=texts[1])
    weights, others = ((folder / "model.safetensors").read_bytes() for folder in (out, other))
    assert len(weights) == len(others) and weights != others
    with running_stack(out, "tiny", worker_flags=SMALL) as stack, stack.client() as client:
        assert client.model().quantization == "int4"
        answer = client.generate(token_ids=PROMPT, max_tokens=8, ignore_eos=True, temperature=0).read()
        assert len(answer.token_ids) == 8


def test_without_compiled_kernels_the_reference_serves(tmp_path: Path, not_compiled: Path) -> None:
    found = json.loads(worker("doctor", "--json", source=not_compiled).stdout)
    assert (found["backend"], found["compiled"]) == ("reference", [])
    assert "were not compiled at install" in found["why"]
    model = write_tiny_model(tmp_path / "tiny")
    for flags, says in (
        (("--backend", "cpu"), "--backend: the CPU kernels were not compiled at install"),
        (("--isa", "avx2"), "--isa: the CPU kernels were not compiled at install"),
    ):
        result = worker("serve", "--model", str(model), "--listen", "127.0.0.1:0", *flags, source=not_compiled)
        assert result.returncode == 2
        assert says in result.stderr
        assert "Traceback" not in result.stderr


def test_settings_that_contradict(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    assert worker("quantize", str(model), str(tmp_path / "int8"), "--format", "int8").returncode == 0
    for folder, flags, says in (
        (model, ("--backend", "reference", "--isa", "avx2"), "--isa: avx2 is for the cpu kernels"),
        (tmp_path / "int8", ("--quantize", "int4"), "--quantize: int4 was asked for, but the checkpoint is int8"),
    ):
        result = worker("serve", "--model", str(folder), "--listen", "127.0.0.1:0", *flags)
        assert result.returncode == 2
        assert says in result.stderr


def test_the_doctor_measures(tmp_path: Path) -> None:
    found = json.loads(worker("doctor", "--json").stdout)
    assert found["backend"] == "cpu"
    assert found["isa"] in found["compiled"] and found["isa"] in found["instruction_sets"]
    limits = found["limits"]
    assert limits["read_bytes_per_s"] > 1e9 and limits["flop_per_s"] > 1e9 and limits["int8_op_per_s"] > 1e9


def test_the_bench_of_the_engine(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny", dtype="bfloat16")
    flags = ("--model", str(model), "--quantize", "int8", "--case", "2,40,5", "--json")
    found = json.loads(worker("bench", "engine", *flags).stdout)
    assert (found["quantization"], found["backend"]) == ("int8", "cpu")
    (case,) = found["cases"]
    assert (case["batch"], case["prompt"], case["new"]) == (2, 40, 5)
    assert case["decode_tok_s"] > 0 and case["prefill_tok_s"] > 0 and 0 < case["decode_bandwidth_share"] < 1
    assert case["decode_step_bytes"] > found["weight_bytes"] > 0 and found["peak_rss_bytes"] > 1e8
    assert worker("bench", "engine", "--model", str(model), "--case", "2,40").returncode == 2
