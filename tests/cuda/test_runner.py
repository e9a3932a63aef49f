"""Steps on a device whose graphs fail on any address that changed: the ids of the reference, whatever the engine does
between two steps, and the next step begun before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from qwire import prefix
from tests.helpers.cuda import Replay, plain_kernels
from tests.helpers.kernels import pack
from tests.helpers.models import write_random_qwen3
from tests.helpers.steps import chunk, greedy, plan, table
from worker.engine.engine import Engine, StepReport
from worker.engine.plan import Draw, ModelRunner, SamplingParams, StepPlan
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.kernels import ReferenceKernels
from worker.kernels.cuda.device import Graph, Memory
from worker.parallel import Group
from worker.runner import TorchRunner
from worker.runner.cuda import CudaRunner, CudaSettings
from worker.runner.memory import NoRoom, blocks_that_fit

T = TypeVar("T")

BLOCKS = 24
"""Few enough that sequences are preempted."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_qwen3(tmp_path_factory.mktemp("model"), heads=4, kv_heads=2, head_dim=16, hidden=64, vocab=128)


def on_device(folder: Path, *, graphs: bool = True) -> tuple[CudaRunner, Replay]:
    recorder = Replay()
    runner = CudaRunner(
        folder,
        kernels=plain_kernels(lambda: recorder),
        settings=CudaSettings(max_running=4, graphs=graphs),
        num_blocks=BLOCKS,
        block_size=4,
    )
    runner.make_ready()
    return runner, recorder


class FirstOfTwo(Group):
    """A stage that nobody is behind: what it hands on is counted."""

    def __init__(self) -> None:
        super().__init__(1, 1, 2)
        self.pending, self.handed_on = 0, 0

    def hand_on(self, x: Tensor) -> None:
        self.pending += 1
        self.handed_on += len(x[0])

    def settle(self) -> None:
        self.pending = 0

    def least(self, value: int) -> int:
        return value


def test_what_a_graph_sends_it_waits_for(folder: Path) -> None:
    group = FirstOfTwo()

    class Settled(Replay):
        def record(self, run: Callable[[], T]) -> tuple[Graph, T]:
            made = super().record(run)
            assert not group.pending  # or the recording would end with a transfer that nobody waits for
            return made

    runner = CudaRunner(
        folder, kernels=plain_kernels(Settled), settings=CudaSettings(max_running=2), num_blocks=BLOCKS, group=group
    )
    runner.make_ready()
    assert group.handed_on == 2 * (1 + 2)  # each rung runs once before it is recorded
    assert len(runner.caches) == 1
    assert runner.execute(plan(chunk([1, 2, 3], 0, [0]))) == [[]]
    assert group.handed_on == 2 * (1 + 2) + 3 and not group.pending


def reference(folder: Path) -> TorchRunner:
    return TorchRunner(folder, num_blocks=BLOCKS, block_size=4, kernels=ReferenceKernels())


def serve(runner: ModelRunner, requests: list[Request], *, every: int, drafts: int = 0) -> dict[Hashable, list[int]]:
    """The ids of requests that come one every so many steps; the pool is verified after each."""
    ahead = runner.positions_ahead if isinstance(runner, CudaRunner) else 0
    limits = SchedulerLimits(max_step_tokens=24, max_running=4, max_draft_tokens=drafts, positions_ahead=ahead)
    ids: dict[Hashable, list[int]] = {}

    def take(report: StepReport) -> None:
        for sequence in report.sequences:
            ids.setdefault((sequence.key, sequence.choice), []).append(sequence.drawn.token_id)

    engine = Engine(runner, limits, max_waiting=100, clock=lambda: 0.0, deliver=take, fault=lambda keys: None)
    waiting = list(requests)
    for step in range(2000):
        if waiting and step % every == 0:
            engine.submit(waiting.pop(0))
        report = engine.step()
        engine.pool.check()
        if report is not None:
            take(report)
        elif not waiting:
            return ids
    raise AssertionError("the engine does not come to an end")


def requests(kind: str) -> list[Request]:
    root = prefix.root(b"model", "float32", 4, "", b"")
    made = []
    for number in range(9):
        # Some share their beginnings, so that blocks are shared, and copied where they part.
        prompt = [3 + (5 * i) % 100 for i in range(3 + 2 * number)] + [number % 3] * (number % 4 + 1)
        params = {
            "greedy": SamplingParams(),
            "sampled": SamplingParams(temperature=0.8, top_k=20, seed=number, repetition_penalty=1.2, logprobs=2),
            "restricted": SamplingParams(allowed_ids=(5, 9, 44), logit_bias={7: 2.0}),
        }[kind]
        made.append(Request(number, prompt, max_tokens=5 + 3 * number, prefix_root=root, sampling=params))
    return made


@pytest.mark.parametrize("kind", ["greedy", "sampled", "restricted"])
@pytest.mark.parametrize("every", [1, 7])
def test_ids_are_the_references(folder: Path, kind: str, every: int) -> None:
    runner, recorder = on_device(folder)
    assert serve(runner, requests(kind), every=every) == serve(reference(folder), requests(kind), every=every)
    assert sum(graph.replays for graph in recorder.graphs) > 40


def test_ids_with_guesses(folder: Path) -> None:
    runner, _ = on_device(folder)
    guessed = serve(runner, requests("greedy"), every=2, drafts=4)
    assert guessed == serve(reference(folder), requests("greedy"), every=2)


def test_choices_of_one_prompt(folder: Path) -> None:
    root = prefix.root(b"model", "float32", 4, "", b"")
    params = SamplingParams(temperature=1.0, seed=3)
    made = [
        Request(n, [4 + n] * (5 + n), max_tokens=12, prefix_root=root, sampling=params, choices=((), (), ()))
        for n in range(2)
    ]
    runner, _ = on_device(folder)
    assert serve(runner, made, every=3) == serve(reference(folder), made, every=3)


def test_without_graphs(folder: Path) -> None:
    expected = serve(reference(folder), requests("greedy"), every=2)
    assert serve(on_device(folder, graphs=False)[0], requests("greedy"), every=2) == expected


def test_a_row_keeps_its_bits_in_deterministic_mode() -> None:
    """Products do; attention's own test is that of the kernel, which is one for decodes and prefills in this mode."""
    kernels = plain_kernels(deterministic=True)
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(96, 80, generator=generator), torch.randn(96, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        packed = pack(kernels, weight.to(dtype), bias.to(dtype))
        x = torch.randn(300, 80, generator=generator).to(dtype)
        whole = kernels.linear(x, packed)
        assert torch.equal(whole, kernels.linear(x, packed, torch.empty_like(whole)))
        for rows in (1, 3, 128, 200):
            assert torch.equal(kernels.linear(x[-rows:], packed), whole[-rows:])
    assert kernels.batch_invariant and "deterministic" in kernels.isa
    assert not plain_kernels().batch_invariant


def test_the_next_step_runs_before_it_is_asked_for(folder: Path) -> None:
    runner, recorder = on_device(folder)
    expected = greedy(reference(folder), [1, 2, 3], 8, table(0, 16, 4))

    def replays() -> int:
        return sum(graph.replays for graph in recorder.graphs)

    blocks = table(0, 16, 4)
    ids, start, got, counts = [1, 2, 3], 0, [], []
    for position in range(8):
        ((drawn,),) = runner.execute(plan(chunk(ids, start, blocks, Draw(SamplingParams(), 0, position))))
        start, ids = start + len(ids), [drawn.token_id]
        got.append(drawn.token_id)
        counts.append(replays())
    assert got == expected
    # The prompt's step has begun the first decode already; since then, each step has begun the one behind it.
    assert counts == list(range(1, 9))


def test_what_was_begun_is_dropped_where_it_was_not_meant(folder: Path) -> None:
    """A sequence whose next token is another than was drawn, or whose block was copied to since."""
    oracle, (runner, _) = reference(folder), on_device(folder)
    draw = Draw(SamplingParams(), 0, 0)
    first = plan(chunk([1, 2, 3], 0, [0, 1], draw), chunk([9, 8, 7], 0, [2, 3], draw))
    assert runner.execute(first) == oracle.execute(first)
    ids = [drawn[0].token_id for drawn in oracle.execute(first)]
    other = (ids[0] + 1) % 128
    second = plan(chunk([other], 3, [0, 1], draw), chunk([ids[1]], 3, [2, 3], draw))
    assert runner.execute(second) == oracle.execute(second)
    third = [drawn[0].token_id for drawn in oracle.execute(second)]
    # Block 1 is made a copy of block 3, which the second sequence has begun: not what was computed behind block 0.
    copied = StepPlan((chunk([third[0]], 4, [2, 1], draw),), ((3, 1),))
    assert runner.execute(copied) == oracle.execute(copied)


def test_a_sequence_that_has_no_block_yet_is_not_begun(folder: Path) -> None:
    runner, recorder = on_device(folder)
    draw = Draw(SamplingParams(), 0, 0)
    runner.execute(plan(chunk([1, 2, 3, 4], 0, [0], draw)))
    assert not any(graph.replays for graph in recorder.graphs)


def test_the_cache_takes_what_a_step_leaves(folder: Path) -> None:
    told = Memory(total=64 * 2**20, free=30 * 2**20, allocated=20 * 2**20, peak=24 * 2**20, reserved=26 * 2**20)
    runner = CudaRunner(
        folder,
        kernels=plain_kernels(told=told),
        settings=CudaSettings(max_step_tokens=40, max_running=4, graphs=False, memory_share=0.75),
        block_size=4,
    )
    runner.make_ready()
    block = 2 * 2 * 2 * 16 * 4 * 4
    # 8 MiB are others', 24 are the step's, but for ten blocks and a dummy that stood in for the cache.
    assert runner.num_blocks == (48 * 2**20 - 8 * 2**20 - 24 * 2**20 + 11 * block) // block
    assert greedy(runner, [1, 2, 3], 4, [0, 1]) == greedy(reference(folder), [1, 2, 3], 4, [0, 1])


def test_a_gpu_without_room() -> None:
    told = Memory(total=2**30, free=2**28, allocated=0, peak=2**29, reserved=2**29)
    with pytest.raises(NoRoom, match=r"0\.7 of 1024 MiB leaves 0 MiB .* 256 MiB are others' and CUDA's, 512 MiB are"):
        blocks_that_fit(told, 0.7, borrowed=0, graph_logits=0, block_bytes=2**10)
    assert blocks_that_fit(told, 0.9, borrowed=2**20, graph_logits=0, block_bytes=2**20) == 921 - 256 - 511
