"""A sequence's bits do not depend on batch mates, chunking, decode or prefill, block size, blocks or threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.models import write_random_qwen2, write_random_qwen3
from tests.helpers.steps import chunk, logits_of, plan, table
from worker.engine.plan import Chunk, Draw, Drawn, SamplingParams, StepPlan
from worker.kernels import QUANTIZED_FORMATS, Kernels, PreparedLinear, choose_kernels
from worker.runner import TorchRunner

LENGTH = 530


def random_ids(count: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(0, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


IDS = random_ids(LENGTH, 7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    windowed = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}
    return {
        "qwen3": write_random_qwen3(root / "qwen3", heads=6, kv_heads=2, head_dim=64, hidden=192, config=windowed),
        "qwen2": write_random_qwen2(root / "qwen2", heads=7, kv_heads=1, hidden=560, tie=False),
    }


@dataclass(frozen=True)
class Case:
    """What a runner is made of."""

    folder: Path
    backend: str
    dtype: str = "float32"
    quantize: str = "none"
    kv_dtype: str = "auto"


@pytest.fixture(
    params=[
        "cpu-qwen3-bfloat16",
        "cpu-qwen3-int8",
        "cpu-qwen3-int4",
        "cpu-qwen2-float32",
        "cpu-qwen2-float16",
        "cpu-qwen3-kv8",
        "cpu-qwen3-kv16",
        "cpu-qwen3-kvbf16",
        "reference-qwen3-bfloat16",
        "reference-qwen2-float32",
        "reference-qwen2-kv8",
    ]
)
def case(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Case:
    backend, model, kind = request.param.split("-")
    if kind.startswith("kv"):
        kv_dtype = {"kv8": "int8", "kv16": "int16", "kvbf16": "bfloat16"}[kind]
        return Case(folders[model], backend, "bfloat16", kv_dtype=kv_dtype)
    if kind in QUANTIZED_FORMATS:
        return Case(folders[model], backend, "bfloat16", kind)
    return Case(folders[model], backend, kind)


def make(case: Case, block_size: int = 16, threads: int = 1) -> TorchRunner:
    torch.set_num_threads(threads)
    kernels = choose_kernels(case.backend, threads=threads).kernels
    return TorchRunner(
        case.folder,
        dtype=case.dtype,
        quantize=case.quantize,
        kv_dtype=case.kv_dtype,
        num_blocks=4096 // block_size,
        block_size=block_size,
        kernels=kernels,
    )


def kv_of(runner: TorchRunner, blocks: tuple[int, ...], length: int) -> list[Tensor]:
    """A sequence's keys and values, position by position."""
    pools = [pool for cache in runner.caches for pool in cache.tensors]
    return [pool[:, list(blocks)].flatten(1, 2)[:, :length].clone() for pool in pools]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("pieces", "length"),
    [([1], 275), ([17], LENGTH), ([3, 250, 7, 1, 1, 40], LENGTH), ([512, 1], LENGTH)],
)
def test_chunks_do_not_matter(case: Case, pieces: list[int], length: int) -> None:
    runner = make(case)
    whole, parts = table(0, LENGTH, 16), table(100, LENGTH, 16)
    expected = logits_of(runner, IDS[:length], whole, [length])
    assert torch.equal(logits_of(runner, IDS[:length], parts, pieces), expected)
    assert same(kv_of(runner, parts, length), kv_of(runner, whole, length))


def test_mates_do_not_matter(case: Case) -> None:
    runner = make(case)
    alone = table(0, LENGTH, 16)
    expected = logits_of(runner, IDS, alone, [LENGTH])
    scattered = tuple(range(255, 255 - len(alone), -1))
    generator = torch.Generator().manual_seed(1)
    mates = [random_ids(400, 10 + i) for i in range(5)]
    start, turn = 0, 0
    progress = [0] * len(mates)
    got = []
    while start < LENGTH:
        own = chunk(IDS[start : start + (90, 1, 33, 1, 1)[turn % 5]], start, scattered)
        others: list[Chunk] = []
        for index, ids in enumerate(mates):
            size = int(torch.randint(0, 3, (1,), generator=generator)) * (1 if index % 2 else 19)
            piece = ids[progress[index] : progress[index] + size]
            if piece:
                others.append(chunk(piece, progress[index], table(40 + 30 * index, 400, 16)))
                progress[index] += len(piece)
        place = int(torch.randint(0, len(others) + 1, (1,), generator=generator))
        before = sum(len(other.token_ids) for other in others[:place])
        logits = runner.forward_logits(plan(*others[:place], own, *others[place:]))
        got.append(logits[before : before + len(own.token_ids)])
        start, turn = start + len(own.token_ids), turn + 1
    assert torch.equal(torch.cat(got), expected)
    assert same(kv_of(runner, scattered, LENGTH), kv_of(runner, alone, LENGTH))


def test_threads_do_not_matter(case: Case) -> None:
    expected = logits_of(make(case), IDS, table(0, LENGTH, 16), [400, 1, 1, 128])
    assert torch.equal(logits_of(make(case, threads=2), IDS, table(0, LENGTH, 16), [400, 1, 1, 128]), expected)


def test_the_size_of_a_batch_does_not_matter(case: Case) -> None:
    """1, 3 and 16 sequences decode side by side, each with the logits that it has alone."""
    runner = make(case)
    prompts = [random_ids(20 + 7 * index, 100 + index) for index in range(16)]
    tables = [table(10 * index, 150, 16) for index in range(16)]
    alone = [logits_of(runner, ids, blocks, [len(ids) - 3, 1]) for ids, blocks in zip(prompts, tables, strict=True)]
    for size in (1, 3, 16):
        for back in (3, 2, 1):
            step = plan(*(chunk([ids[-back]], len(ids) - back, tables[i]) for i, ids in enumerate(prompts[:size])))
            expected = torch.stack([logits[-back] for logits in alone[:size]])
            assert torch.equal(runner.forward_logits(step), expected)


@pytest.mark.parametrize("block_size", [32, 64])
def test_block_size_does_not_matter(case: Case, block_size: int) -> None:
    expected = logits_of(make(case), IDS, table(0, LENGTH, 16), [LENGTH])
    got = logits_of(make(case, block_size), IDS, table(3, LENGTH, block_size), [LENGTH - 2, 1])
    assert torch.equal(got, expected)


def test_where_a_prefix_was_copied_from_does_not_matter(case: Case) -> None:
    """A sequence shares one block of another, and has a copy of the next in the step in which that is written further;
    the copy comes by way of a third block."""
    runner = make(case)
    owner, ids = IDS[:60], [*IDS[:27], *random_ids(30, 3)]
    draw = Draw(SamplingParams(temperature=1.0, seed=3), 0, 0)
    ((alone,),) = runner.execute(plan(chunk(ids, 0, table(50, 60, 16), draw)))
    runner.execute(plan(chunk(owner[:30], 0, [0, 1])))
    both = StepPlan((chunk(owner[30:], 30, [0, 1, 2, 3]), chunk(ids[27:], 27, [0, 4, 5, 6], draw)), ((1, 7), (7, 4)))
    assert runner.execute(both) == [[], [alone]]
    assert same(kv_of(runner, (0, 4, 5, 6), len(ids)), kv_of(runner, table(50, 60, 16), len(ids)))


def test_reused_blocks_do_not_leak(case: Case) -> None:
    """What an earlier sequence left in a block, not-a-number included, does not reach the next one."""
    runner = make(case)
    blocks = table(0, 100, 16)
    expected = logits_of(runner, IDS[:100], blocks, [90, 1])
    with torch.inference_mode():
        for tensor in (tensor for cache in runner.caches for tensor in cache.tensors):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 99)
    assert torch.equal(logits_of(runner, IDS[:100], blocks, [90, 1]), expected)


def test_draws_do_not_depend_on_the_batch(case: Case) -> None:
    runner = make(case)
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=5),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9, seed=6),
        SamplingParams(temperature=1.5, min_p=0.05, seed=7),
        SamplingParams(temperature=2.0, top_p=0.999, seed=8),
    ]
    chunks = [
        chunk(random_ids(5 + index, index), 0, table(10 * index, 16, 16), Draw(param, 0, 3))
        for index, param in enumerate(params)
    ]
    alone = [runner.execute(plan(one))[0] for one in chunks]
    assert runner.execute(plan(*chunks)) == alone
    assert runner.execute(plan(*reversed(chunks))) == alone[::-1]


def test_what_is_asked_of_a_step_does_not_matter(case: Case) -> None:
    """The last layer leaves out rows whose hidden states nobody reads: those that are read have the bits that they have
    where all are, and all have the same keys and values."""
    runner = make(case)
    draw, ids, mate = Draw(SamplingParams(temperature=1.0, seed=3, logprobs=2), 0, 0), IDS[:200], IDS[200:290]
    blocks, other = table(0, 200, 16), table(20, 90, 16)
    every = plan(Chunk(ids, 0, blocks, (draw,), scored=ids, scored_top=1), Chunk(mate, 0, other, scored=mate))
    (*scores, drawn), mates = runner.execute(every)
    expected = kv_of(runner, (*blocks, *other), 290)
    with torch.inference_mode():
        for pool in (pool for cache in runner.caches for pool in cache.tensors):
            pool.zero_()
    few = plan(Chunk(ids, 0, blocks, (draw,), scored=ids[:30], scored_top=1), Chunk(mate, 0, other, scored=mate[:1]))
    assert runner.execute(few) == [[*scores[:30], drawn], mates[:1]]
    assert same(kv_of(runner, (*blocks, *other), 290), expected)
    assert runner.execute(plan(chunk(ids, 0, blocks), chunk(mate, 0, other, draw))) == [[], [mates_draw(runner, mate)]]


def mates_draw(runner: TorchRunner, ids: Sequence[int]) -> Drawn:
    """What comes behind these ids, computed one by one."""
    draw = Draw(SamplingParams(temperature=1.0, seed=3, logprobs=2), 0, 0)
    blocks = table(40, len(ids), 16)
    for position, token in enumerate(ids[:-1]):
        runner.execute(plan(chunk([token], position, blocks)))
    ((drawn,),) = runner.execute(plan(chunk(ids[-1:], len(ids) - 1, blocks, draw)))
    return drawn


def test_the_last_layer_leaves_out_rows_that_nobody_reads(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = TorchRunner(folders["qwen3"], num_blocks=64)
    multiply, rows = type(runner.kernels).gated_linear, []

    def watched(kernels: Kernels, x: Tensor, weight: PreparedLinear, out: Tensor | None = None) -> Tensor:
        rows.append(len(x))
        return multiply(kernels, x, weight, out)

    monkeypatch.setattr(type(runner.kernels), "gated_linear", watched)
    runner.execute(plan(chunk(IDS[:100], 0, table(0, 100, 16))))
    runner.execute(plan(chunk(IDS[100:300], 100, table(0, 300, 16), Draw(SamplingParams(), 0, 0))))
    assert rows == [100, 1, 200, 1]


def test_drafts_draw_what_decodes_draw(case: Case) -> None:
    """A decode with guesses behind it draws at each position what a step of its own would; what was wrong of them is
    written over."""
    runner = make(case)
    params = SamplingParams(temperature=1.0, seed=4, frequency_penalty=0.3, logprobs=2)
    prompt, blocks = IDS[:40], table(0, 80, 16)
    alone: list[Drawn] = []
    tokens, start = list(prompt), 0
    for position in range(20):
        ((drawn,),) = runner.execute(plan(chunk(tokens[start:], start, blocks, _draw(params, tokens, position))))
        start = len(tokens)
        tokens.append(drawn.token_id)
        alone.append(drawn)
    other, mate = table(20, 80, 16), chunk(IDS[100:133], 0, table(40, 33, 16), Draw(SamplingParams(), 0, 0))
    runner.execute(plan(chunk(tokens[:40], 0, other)))
    for first, right in ((0, 5), (6, 0), (7, 12)):
        drafts = [*tokens[40 + first : 40 + first + right], (tokens[40 + first + right] + 1) % 512, 3]
        ids = [tokens[39 + first], *drafts]
        draws = [_draw(params, [*tokens[: 40 + first], *drafts[:count]], first + count) for count in range(len(ids))]
        step = plan(mate, Chunk(ids, 39 + first, other, draws, len(drafts)))
        assert runner.execute(step)[1][: right + 1] == alone[first : first + right + 1]


def _draw(params: SamplingParams, tokens: Sequence[int], position: int) -> Draw:
    return Draw(params, 0, position, prompt_ids=tokens[:40], generated_ids=tokens[40:])


def test_plans_that_leave_their_blocks_are_refused(folders: dict[str, Path]) -> None:
    runner = TorchRunner(folders["qwen3"], num_blocks=4)
    for bad in (
        chunk([1] * 17, 0, [0]),
        chunk([1], 64, [0, 1, 2, 3]),
        chunk([1], 0, [4]),
        chunk([512], 0, [0]),
        chunk([-1], 0, [0]),
        chunk([], 0, [0]),
        Chunk([1, 2], 0, [0], (Draw(SamplingParams(), 0, 0),), 1),
    ):
        with pytest.raises(ValueError, match=r"."):
            runner.execute(plan(bad))


def test_chunks_without_a_draw_return_none(folders: dict[str, Path]) -> None:
    runner = TorchRunner(folders["qwen3"], num_blocks=8)
    first, second = chunk(IDS[:20], 0, [0, 1]), chunk(IDS[:5], 0, [2], Draw(SamplingParams(), 0, 0))
    tokens = runner.execute(plan(first, second))
    assert [len(drawn) for drawn in tokens] == [0, 1]
    assert runner.execute(plan(first)) == [[]]
