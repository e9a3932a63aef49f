"""A step raises: its worker ends and is replaced, what was in it moves, and what keeps raising is found out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from qwire import Reason
from tests.faults.conftest import FLAGS
from tests.faults.load import Load, Options, References, check, check_nothing_left, load
from tests.faults.processes import wait_for_workers, workers
from tests.helpers.faulty_worker import MARK, ONCE, POISON
from tests.helpers.stacks import FAULTY_WORKER, RunningStack, eventually, running_stack


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, str(tmp_path_factory.mktemp("faulty") / "mark"))
        with running_stack(
            tiny_model,
            "tiny",
            workers=2,
            worker_flags=FLAGS,
            router_flags=("--worker-wait", "60"),
            commands=FAULTY_WORKER,
        ) as stack:
            wait_for_workers(stack)
            yield stack


@pytest.fixture(scope="module")
def neighbours() -> list[Options]:
    return [
        {"token_ids": [number, 1], "seed": number, "temperature": 1.0, "max_tokens": 120, "ignore_eos": True}
        for number in range(6)
    ]


def boots(stack: RunningStack) -> set[str]:
    return {worker.info.boot_id for worker in workers(stack) if worker.ready}


def test_one_step_raises(pair: RunningStack, references: References, neighbours: list[Options]) -> None:
    before = boots(pair)
    with load(pair.address, neighbours) as running:
        running.wait_for_tokens(10)
        unlucky = Load(pair.address, [{"token_ids": ONCE, "temperature": 0, "max_tokens": 20, "ignore_eos": True}])
        unlucky.start()
        assert eventually(lambda: any("exited with status 1" in line for line in pair.lines), 20)
        wait_for_workers(pair)
        records = unlucky.finish()
    check([*running.records, *records], references)
    assert records[0].finished[0].placement.moves == 1
    assert len(before - boots(pair)) == 1
    check_nothing_left(pair)


def test_a_request_that_crashes_whatever_worker_runs_it(
    pair: RunningStack, references: References, neighbours: list[Options]
) -> None:
    before = boots(pair)
    with load(pair.address, neighbours) as running:
        running.wait_for_tokens(10)
        poison = Load(pair.address, [{"token_ids": POISON, "temperature": 0, "max_tokens": 20}])
        poison.start()
        (record,) = poison.finish()
    assert record.error is not None
    assert (record.error.code, record.error.reason) == (grpc.StatusCode.INTERNAL, Reason.REQUEST_FAULTS_WORKER)
    assert (record.accepted, record.ids) == (1, {})
    check(running.records, references)
    wait_for_workers(pair)
    assert before.isdisjoint(boots(pair))
    check_nothing_left(pair)
