"""The cpu kernels within a model: against the reference, by instruction set, and in every format that weights have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.helpers.models import write_random_qwen2, write_random_qwen3
from tests.helpers.native_modules import each_isa, instruction_sets, module
from tests.helpers.steps import chunk, greedy, logits_of, plan, table
from worker.config import WorkerConfig
from worker.engine.plan import Draw, SamplingParams
from worker.identity import Digests, describe
from worker.kernels import NativeError, ReferenceKernels, choose_kernels
from worker.kernels.cpu import CpuKernels
from worker.kernels.names import SAME_BITS
from worker.runner import TorchRunner

NEAR = 1e-2
"""Logits this close may change places between backends."""

PROMPTS = [
    f"{verb} {what}"
    for verb in ("The history of", "A short story about", "The price of", "Nobody in the village had heard of")
    for what in ("the sea", "the number seven", "bread", "an old clock", "three rivers in France")
]


@pytest.mark.slow
def test_bfloat16_against_the_reference(tmp_path: Path, demo_folder: Path) -> None:
    """Teacher-forced on the reference's ids: the same top id wherever the two best are far enough apart, and logits
    that are nearer where keys and values are what they are by default.

    The reference computes in float32 over the same bfloat16 weights, and ids over keys and values of bfloat16.
    """
    weights = load_file(demo_folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    config = json.loads((demo_folder / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_file(str(demo_folder / "tokenizer.json"))
    oracle = TorchRunner(
        tmp_path, num_blocks=64, dtype="float32", kv_dtype="bfloat16", kernels=ReferenceKernels(), block_size=32
    )
    sequences = [list(tokenizer.encode(text).ids) for text in PROMPTS]
    tables = [table(3 * index, 96, 32) for index in range(len(sequences))]
    done = [0] * len(sequences)
    for position in range(16):
        steps = plan(
            *(
                chunk(ids[start:], start, blocks, Draw(SamplingParams(), 0, position))
                for ids, start, blocks in zip(sequences, done, tables, strict=True)
            )
        )
        done = [len(ids) for ids in sequences]
        for ids, (drawn,) in zip(sequences, oracle.execute(steps), strict=True):
            ids.append(drawn.token_id)
    whole = plan(*(chunk(ids, 0, blocks) for ids, blocks in zip(sequences, tables, strict=True)))
    expected = oracle.forward_logits(whole)
    best = expected.topk(2).values
    clear = best[:, 0] - best[:, 1] > NEAR
    assert int(clear.sum()) > len(clear) * 0.9
    exact = TorchRunner(
        tmp_path, num_blocks=64, dtype="float32", kernels=ReferenceKernels(), block_size=32
    ).forward_logits(whole)
    kernels, errors = choose_kernels("cpu", threads=2).kernels, []
    assert isinstance(kernels, CpuKernels)
    for kv_dtype in ("auto", "bfloat16"):
        tested = TorchRunner(tmp_path, num_blocks=64, kv_dtype=kv_dtype, kernels=kernels, block_size=32)
        coded = kv_dtype == "auto" and kernels.native.fixed_point
        assert (tested.dtype, tested.kv_dtype) == (torch.bfloat16, torch.int16 if coded else torch.bfloat16)
        got = tested.forward_logits(whole)
        assert torch.equal(got.argmax(-1)[clear], expected.argmax(-1)[clear])
        errors.append(float((got - exact).norm()))
    assert errors[0] < errors[1] if kernels.native.fixed_point else errors[0] == errors[1]


@each_isa
@pytest.mark.parametrize(
    ("quantize", "kv_dtype"),
    [("none", "bfloat16"), ("none", "int8"), ("none", "int16"), ("int8", "bfloat16"), ("int4", "bfloat16")],
)
def test_every_instruction_set_gives_the_references_logits(
    tmp_path: Path, isa: str, quantize: str, kv_dtype: str
) -> None:
    folder = write_random_qwen3(tmp_path, dtype="bfloat16", hidden=160, heads=4, kv_heads=2, head_dim=80)
    ids = [(7 * i) % 512 for i in range(80)]
    reference = TorchRunner(
        folder, num_blocks=8, dtype="float32", kv_dtype=kv_dtype, quantize=quantize, kernels=ReferenceKernels()
    )
    expected = logits_of(reference, ids, table(0, 80, 16), [80])
    kernels = choose_kernels("cpu", isa).kernels
    assert (kernels.name, kernels.isa) == ("cpu", isa)
    runner = TorchRunner(folder, num_blocks=8, quantize=quantize, kv_dtype=kv_dtype, kernels=kernels)
    got = logits_of(runner, ids, table(0, 80, 16), [60, 1])
    # Quantized weights meet rows of 8 bits here, fixed-point ones of 13, and all rows of 32 in the reference.
    error = (got - expected).norm() / expected.norm()
    assert error < (0.03 if quantize != "none" else 0.008 if module(isa).fixed_point else 0.004)


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_a_numerics_id_stands_for_bits(tmp_path: Path, quantize: str) -> None:
    """Instruction sets share one where every logit is the same, over prompts and single tokens."""
    folder = write_random_qwen3(tmp_path, dtype="bfloat16", hidden=160, heads=4, kv_heads=2, head_dim=80)
    ids = [(7 * i) % 512 for i in range(80)]
    digests = Digests("weights", "config", "tokenizer")
    logits: dict[str, torch.Tensor] = {}
    for isa in instruction_sets():
        kernels = choose_kernels("cpu", isa).kernels
        runner = TorchRunner(folder, num_blocks=8, quantize=quantize, kernels=kernels)
        told = describe(WorkerConfig(model=folder), runner, digests, constraints=False)
        got = logits_of(runner, ids, table(0, 80, 16), [79, 1])
        assert torch.equal(got, logits.setdefault(told.model.numerics_id, got))
    assert len(logits) == len({SAME_BITS.get(isa, isa) for isa in instruction_sets()})


def test_tied_weights_are_kept_once(tmp_path: Path) -> None:
    def size(tie: bool) -> int:
        folder = write_random_qwen3(tmp_path / str(tie), tie=tie, dtype="bfloat16")
        return TorchRunner(folder, num_blocks=1, kernels=choose_kernels("cpu").kernels).weight_bytes

    # What a step multiplies is the same; the untied embedding is only looked up.
    assert size(True) == size(False)


def test_heads_that_the_cpu_kernels_do_not_take(tmp_path: Path) -> None:
    folder = write_random_qwen2(tmp_path, heads=4, hidden=96)
    assert TorchRunner(folder, num_blocks=1).kernels.name == "reference"
    with pytest.raises(NativeError, match="multiples of 16, the model has 24"):
        choose_kernels("cpu", head_dim=24)


def test_key_values_of_another_type_than_weights(tmp_path: Path) -> None:
    folder = write_random_qwen3(tmp_path, dtype="float32")
    runner = TorchRunner(folder, num_blocks=4, kv_dtype="bfloat16")
    assert {cache.keys.dtype for cache in runner.caches} == {torch.bfloat16}
    assert len(greedy(runner, [1, 2, 3], 4, [0])) == 4
