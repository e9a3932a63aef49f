"""Recorded decode steps: the ladder, padding, replays, and memory that stays where it is; by graphs that fail when it
doesn't."""

from __future__ import annotations

import gc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.cuda import AddressChanged, CpuDevice, Replay
from worker.kernels.cuda.attention import CudaPlan
from worker.kernels.cuda.staging import Staging
from worker.runner.graphs import DecodeBuffers, DecodeGraphs, DecodeRows, ladder

BLOCK, DUMMY, VOCAB = 4, 9, 3


class Steps:
    """A model whose logits say what it was given, and which keeps the last position of every slot."""

    def __init__(self) -> None:
        self.cache = torch.full(((DUMMY + 1) * BLOCK,), -1, dtype=torch.int64)
        self.calls = 0

    def __call__(self, ids: Tensor, positions: Tensor, slots: Tensor, plan: CudaPlan) -> Tensor:
        self.calls += 1
        self.cache.index_put_((slots,), positions)
        blocks = plan.where.tables[:, 0].to(torch.int64) + plan.where.key_lengths
        return torch.stack((ids, positions, blocks), 1).float()


def recorded(most: int = 8) -> tuple[Steps, DecodeGraphs, Replay, Staging]:
    recorder, model = Replay(), Steps()
    rungs = ladder(most)
    device = CpuDevice(lambda: recorder)
    buffers = DecodeBuffers(rungs[-1], 4, BLOCK, DUMMY, device.torch)
    return model, DecodeGraphs(rungs, buffers, model, recorder), recorder, Staging(device)


def rows(*positions: int) -> DecodeRows:
    """Sequences with a block each, from block 0 on."""
    at = np.array(positions, np.int64)
    blocks = np.arange(len(at))
    return DecodeRows(at, blocks * BLOCK + at % BLOCK, blocks[:, None].astype(np.int32))


@given(most=st.integers(1, 600))
def test_the_ladder_reaches_what_may_run(most: int) -> None:
    rungs = ladder(most)
    assert rungs[-1] >= most and list(rungs) == sorted(set(rungs))
    assert len(rungs) == 1 or rungs[-2] < most
    # No step is padded by more than itself, nor by more than 15 rows.
    assert all(after - before - 1 <= min(max(before, 1), 15) for before, after in pairwise(rungs))


def test_a_step_takes_the_least_rung_that_holds_it() -> None:
    model, graphs, recorder, staging = recorded()
    assert graphs.rungs == (1, 2, 4, 8)
    assert [graphs.rung(count) for count in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, None]
    calls = model.calls
    for count in (3, 1, 8):
        step = rows(*range(count))
        got = graphs.run(step, torch.arange(count) + 50, staging)
        assert got is not None
        expected = [[50.0 + row, row, row + row + 1.0] for row in range(count)]
        assert got.tolist() == expected
    # Rungs were recorded from the largest down.
    assert [graph.replays for graph in recorder.graphs] == [1, 1, 0, 1]
    assert model.calls == calls
    with pytest.raises(ValueError, match="beyond the ladder's 8"):
        graphs.run(rows(*range(9)), torch.arange(9), staging)


def test_rows_of_an_earlier_step_are_not_written_again() -> None:
    model, graphs, _, staging = recorded()
    graphs.run(rows(0, 1, 2, 3, 0, 1, 2), torch.arange(7), staging)
    model.cache.fill_(-1)
    graphs.run(rows(3, 2, 1, 0, 3), torch.arange(5), staging)  # the same rung: two rows less
    written = torch.nonzero(model.cache >= 0).flatten().tolist()
    assert written == [3, 6, 9, 12, 19, DUMMY * BLOCK]


def test_outputs_are_gone_with_the_next_replay() -> None:
    model, graphs, _, staging = recorded()
    first = graphs.run(rows(1, 2), torch.arange(2), staging)
    assert first is not None and not first.isnan().any()
    graphs.run(rows(1), torch.arange(1), staging)
    assert first.isnan().all()
    assert model.calls == 2 * len(graphs.rungs)


def test_memory_that_is_given_back_fails_a_replay() -> None:
    model, graphs, _, staging = recorded()
    model.cache = model.cache.clone()  # what the graphs write to is gone
    gc.collect()
    with pytest.raises(AddressChanged):
        graphs.run(rows(1), torch.arange(1), staging)


def test_what_the_host_reads_is_not_recorded() -> None:
    recorder = Replay()
    with pytest.raises(RuntimeError, match="value that the host reads"):
        recorder.record(lambda: torch.arange(3).sum().item())


def test_ids_may_be_on_their_way() -> None:
    """Ids come from a tensor of the device, never by way of the host."""
    model, graphs, _, staging = recorded()
    drawn = torch.tensor([7, 8, 9])
    got = graphs.run(rows(1, 2, 3), drawn, staging)
    drawn.fill_(0)
    assert got is not None and got[:, 0].tolist() == [7, 8, 9]
    assert model.cache[1] == 1
