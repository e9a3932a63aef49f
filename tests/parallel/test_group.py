"""The ordered sum, the shares of a vocabulary, orders as bytes, and messages of any length between real ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwire.v1 import plan_pb2
from tests.helpers.models import write_random_qwen3
from worker.engine.plan import Chunk, Draw, SamplingParams, StepPlan
from worker.model import ModelConfig, ModelError, Shard, check_shares
from worker.parallel import Group
from worker.parallel.group import ordered_sum
from worker.runner.wire import BEAT, STOP, decode_step, encode_step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_sum_is_sequential_wherever_a_row_stands(dtype: torch.dtype, world: int) -> None:
    generator = torch.Generator().manual_seed(world)
    parts = [(torch.randn(7, 33, generator=generator) * 10**rank).to(dtype) for rank in range(world)]
    expected = torch.empty(7, 33, dtype=dtype)
    for row in range(7):
        for column in range(33):
            total = parts[0][row, column].float()
            for part in parts[1:]:
                total = total + part[row, column].float()
            expected[row, column] = total.to(dtype)
    assert torch.equal(ordered_sum(parts), expected)
    order = [4, 0, 6, 2, 5, 1, 3]
    assert torch.equal(ordered_sum([part[order] for part in parts]), expected[order])
    for row in range(7):
        assert torch.equal(ordered_sum([part[row : row + 1] for part in parts]), expected[row : row + 1])


@given(size=st.integers(1, 10_000), world=st.integers(1, 16))
def test_a_vocabulary_is_shared_out_whole(size: int, world: int) -> None:
    shards = [Shard(rank, world) for rank in range(world)]
    bounds = [shard.vocab_bounds(size) for shard in shards]
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(size))
    rows = {shard.rows(size) for shard in shards}
    assert len(rows) == 1
    (each,) = rows
    assert size <= each * world < size + world
    for rank, (start, stop) in enumerate(bounds):
        assert 0 <= stop - start <= each
        # An id's place in its rank's rows is its distance from rank * rows, which is how it is looked up.
        assert start == stop or start == rank * each


def test_heads_that_do_not_divide_are_told(tmp_path: Path) -> None:
    config = ModelConfig.read(write_random_qwen3(tmp_path, heads=6, kv_heads=2, intermediate=250, hidden=96))
    check_shares(config, 1)
    check_shares(config, 2)
    for world, words in (
        (4, "num_attention_heads, 6, cannot be shared out over 4 ranks"),
        (3, "num_key_value_heads, 2, cannot be shared out over 3 ranks"),
        (6, "intermediate_size, 250, cannot be shared out over 6 ranks"),
    ):
        with pytest.raises(ModelError, match=words):
            check_shares(config, world)


IDS = st.integers(0, 2**32 - 1)
CHUNKS = st.builds(
    Chunk,
    token_ids=st.lists(IDS, min_size=1, max_size=40).map(tuple),
    start=st.integers(0, 2**40),
    block_table=st.lists(IDS, max_size=40).map(tuple),
    draws=st.lists(
        st.builds(Draw, st.just(SamplingParams()), st.integers(0, 20), st.integers(0, 2**30)), max_size=3
    ).map(tuple),
    drafts=st.integers(0, 12),
)


@given(st.lists(CHUNKS, max_size=12), st.lists(st.tuples(IDS, IDS), max_size=4))
def test_a_plan_survives_the_wire(chunks: list[Chunk], copies: list[tuple[int, int]]) -> None:
    data = encode_step(StepPlan(tuple(chunks), copies))
    order = plan_pb2.RankOrder.FromString(data)
    assert order.WhichOneof("order") == "step"
    plan = decode_step(order.step)
    assert len(plan.chunks) == len(chunks)
    for got, sent in zip(plan.chunks, chunks, strict=True):
        assert (got.token_ids, got.start, got.block_table) == (sent.token_ids, sent.start, sent.block_table)
        assert (len(got.draws), got.drafts) == (len(sent.draws), sent.drafts)
    assert list(plan.copies) == copies
    assert encode_step(plan) == data


def test_other_orders() -> None:
    assert plan_pb2.RankOrder.FromString(BEAT).WhichOneof("order") == "beat"
    assert plan_pb2.RankOrder.FromString(STOP).WhichOneof("order") == "stop"


def test_a_group_of_one_changes_nothing() -> None:
    group, x = Group(), torch.randn(3, 5)
    assert group.sum(x) is x
    assert group.gather(x) == [x]
    with pytest.raises(ValueError, match="rank 2"):
        Group(2, 2)


CHECK = """
import json, sys, torch
from worker.parallel import Group, run_ranks

def main(place):
    torch.set_num_threads(1)
    world = int(sys.argv[1])
    group = Group(place.rank, world)
    group.connect(place.meeting, timeout=20)
    sizes = (0, 1, 2039, 2040, 2041, 4096, 300_000)
    messages = [bytes(i % 251 for i in range(size)) for size in sizes]
    for message in messages:
        if place.rank == 0:
            group.send_all(message)
        else:
            assert group.receive() == message
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        parts = [torch.randn(9, 50, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world)]
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        assert torch.equal(group.sum(parts[place.rank]), total.to(dtype))
        gathered = group.gather(parts[place.rank][:4])
        assert (gathered is None) == (place.rank > 0)
        assert gathered is None or all(torch.equal(a, b[:4]) for a, b in zip(gathered, parts, strict=True))
    group.meet()
    if place.rank == 0:
        listening = [line.split()[1] for path in ("/proc/net/tcp", "/proc/net/tcp6")
                     for line in open(path).readlines()[1:] if line.split()[3] == "0A"]
        print(json.dumps(listening))
    group.meet()
    return 0

sys.exit(run_ranks(int(sys.argv[1]), main, final=(1,)))
"""


STAGES = """
import sys, torch
from worker.parallel import Group, run_ranks

def main(place):
    torch.set_num_threads(1)
    group = Group(place.rank, 2, 3)
    group.connect(place.meeting, timeout=20)
    assert group.least(10 + (3 * place.rank) % 5) == 10
    x = torch.full((4, 8), float(place.rank))
    # Sums and gathers stay within a stage: of ranks 0 and 1, 2 and 3, 4 and 5.
    first = place.rank // 2 * 2
    assert torch.equal(group.sum(x), torch.full((4, 8), 2.0 * first + 1))
    gathered = group.gather(x)
    assert (gathered is None) == (group.rank > 0)
    assert gathered is None or [int(part[0, 0]) for part in gathered] == [first, first + 1]
    for part in range(3):  # several are under way at once
        held = torch.full((300, 70), float(100 * place.rank + part))
        if not group.first_stage:
            got = group.take_over(torch.empty(300, 70))
            assert torch.equal(got, torch.full((300, 70), float(100 * (place.rank + 2) + part)))
        if not group.last_stage:
            group.hand_on(held)
    group.settle()
    group.meet()
    return 0

sys.exit(run_ranks(6, main, final=(1,)))
"""


def test_stages_hand_on() -> None:
    argv = [sys.executable, "-c", STAGES]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_exchange(world: int) -> None:
    argv = [sys.executable, "-c", CHECK, str(world)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)
