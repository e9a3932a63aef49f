"""The launcher, with ranks that only sleep and die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import logging, os, signal, sys, time
from pathlib import Path
from worker.parallel import RankPolicy, run_ranks

stage = Path(sys.argv[1])
logging.basicConfig(level=logging.INFO, stream=sys.stderr)

def main(place):
    with open(stage / "starts", "a") as file:
        file.write(f"{place.rank} {os.getpid()} {place.remembered}\\n")
    return RANK(place)

RANK_CODE
policy = RankPolicy(first_delay=0.01, longest_delay=0.05, fault_grace=0.5, stop_grace=1.0)
sys.exit(run_ranks(2, main, final=(2, 3), policy=policy))
"""

# Rank 0 serves until SIGTERM and then has the others end; each rank obeys a file with an exit status of its own.
SERVING = """
def RANK(place):
    told = []
    if place.rank == 0:
        signal.signal(signal.SIGTERM, lambda *_: told.append(1))
        place.remember("port 7")
    while not told and not (stage / "stop").exists():
        time.sleep(0.01)
        order = stage / f"exit-{place.rank}"
        if order.exists():
            status = int(order.read_text())
            order.unlink()
            return status
    if place.rank == 0:
        (stage / "stop").touch()
    return 0
"""


class Stage:
    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process

    def starts(self) -> list[tuple[int, int, str]]:
        path = self.folder / "starts"
        lines = [line.split(" ", 2) for line in path.read_text().splitlines()] if path.exists() else []
        return sorted((int(rank), int(pid), rest) for rank, pid, rest in lines)

    def until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.01)

    def groups(self, count: int) -> list[tuple[int, int, str]]:
        self.until(lambda: len(self.starts()) == 2 * count)
        return self.starts()


@contextmanager
def launched(folder: Path, code: str = SERVING) -> Iterator[Stage]:
    argv = [sys.executable, "-c", PROGRAM.replace("RANK_CODE", code), str(folder)]
    process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield Stage(folder, process)
    finally:
        process.kill()
        process.communicate()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_signal_reaches_rank_0_and_all_end_well(tmp_path: Path) -> None:
    with launched(tmp_path) as stage:
        pids = [pid for _, pid, _ in stage.groups(1)]
        time.sleep(0.2)
        stage.process.send_signal(signal.SIGTERM)
        assert stage.process.wait(10) == 0
        assert not any(alive(pid) for pid in pids)


def test_lost_groups_are_replaced_and_remember(tmp_path: Path) -> None:
    with launched(tmp_path) as stage:
        first = stage.groups(1)
        assert [remembered for _, _, remembered in first] == ["", ""]
        time.sleep(0.1)
        os.kill(first[0][1], signal.SIGKILL)
        second = [start for start in stage.groups(2) if start not in first]
        assert [remembered for _, _, remembered in second] == ["port 7", "port 7"]
        assert not any(alive(pid) for _, pid, _ in first)
        time.sleep(0.1)
        os.kill(second[1][1], signal.SIGSTOP)  # a stopped rank is killed like any other
        (tmp_path / "exit-0").write_text("1")
        stage.groups(3)
        assert not any(alive(pid) for _, pid, _ in second)
        assert stage.process.poll() is None


def test_a_status_that_another_start_would_repeat_ends_it(tmp_path: Path) -> None:
    with launched(tmp_path) as stage:
        stage.groups(1)
        (tmp_path / "exit-1").write_text("3")
        assert stage.process.wait(10) == 3
        assert len(stage.starts()) == 2


def test_groups_that_never_get_to_work_end_it(tmp_path: Path) -> None:
    # The other rank never ends first: rank 0 would be killed for it, perhaps before it has noted its start.
    with launched(tmp_path, "def RANK(place):\n    time.sleep(60 * place.rank)\n    return 4\n") as stage:
        assert stage.process.wait(10) == 4
        assert [rank for rank, _, _ in stage.starts()].count(0) == 3


def test_ranks_die_with_the_launcher(tmp_path: Path) -> None:
    with launched(tmp_path) as stage:
        pids = [pid for _, pid, _ in stage.groups(1)]
        stage.process.kill()
        stage.until(lambda: not any(alive(pid) for pid in pids), 2)
