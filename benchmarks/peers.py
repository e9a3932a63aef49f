"""Our engine against others, on models of one shape: both sides in turn, each in a process of its own, medians.

    python -m benchmarks.peers --lab LAB --bench BENCH.py --pair FOLDER:PEER:DTYPE --case 1,128,128 ... [--rounds 3]
                              [--kv-dtype int8]

LAB holds a virtual environment for each PEER; BENCH.py, run by its Python as `BENCH.py PEER DTYPE --cases B,P,N`,
prints a JSON line {"version", "cases": [{"prefill_tok_s", "decode_tok_s"}]}. FOLDER is what we serve, quantized or not.

Shared machines change their state within seconds. It is probed before and after every sample, and a round counts only
if all of its probes saw the same state; up to twice as many rounds are run as are asked for.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from worker.kernels import choose_kernels, usable_cpus
from worker.limits import Limits, probe

GOOD = 0.75
"""A state is good if it has this share of the best seen, of bandwidth and of arithmetic."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A folder of ours and what it is compared with."""

    folder: Path
    peer: str
    dtype: str

    @classmethod
    def parse(cls, text: str) -> Pair:
        """From FOLDER:PEER:DTYPE; a usage error for anything else."""
        folder, _, rest = text.partition(":")
        peer, _, dtype = rest.partition(":")
        if not (folder and peer and dtype):
            raise click.BadParameter(f"{text!r} is not of the form FOLDER:PEER:DTYPE")
        return cls(Path(folder), peer, dtype)


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens a second."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Round:
    """A turn of each side, and the machine's state before, between and after them."""

    ours: Sample
    theirs: Sample
    states: tuple[Limits, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of the rounds that count."""

    folder: str
    peer: str
    version: str
    dtype: str
    case: str
    ours: Sample
    theirs: Sample
    prefill_ratio: float
    decode_ratio: float
    bandwidth_share: float
    """Of our decode step, of the limit measured in the same process."""
    rounds: int
    """That count."""
    run: int
    """That were run."""
    good: bool
    """Whether they were in the machine's good state."""


class Machine:
    """What was the best seen of it."""

    def __init__(self) -> None:
        self._read = self._flop = 0.0

    def look(self) -> Limits:
        seen = probe()
        self._read, self._flop = max(self._read, seen.read_bytes_per_s), max(self._flop, seen.flop_per_s)
        return seen

    def good(self, state: Limits) -> bool:
        return state.read_bytes_per_s >= GOOD * self._read and state.flop_per_s >= GOOD * self._flop


def ours(folder: Path, case: str, kv_dtype: str) -> tuple[Sample, float]:
    """A turn of our engine, and its share of the bandwidth limit."""
    engine = [sys.executable, "-m", "worker", "bench", "engine"]
    told = _told([*engine, "--model", str(folder), "--kv-dtype", kv_dtype, "--case", case, "--json"])
    result = told["cases"][0]
    return Sample(result["prefill_tok_s"], result["decode_tok_s"]), result["decode_bandwidth_share"]


def theirs(lab: Path, bench: Path, pair: Pair, case: str) -> tuple[Sample, str]:
    """A turn of a peer, and its version."""
    python = lab / pair.peer / "bin" / "python"
    told = _told([str(python), str(bench), pair.peer, pair.dtype, "--cases", case], LAB=str(lab))
    result = told["cases"][0]
    return Sample(result["prefill_tok_s"], result["decode_tok_s"]), told["version"]


def _told(argv: Sequence[str], **environ: str) -> dict[str, Any]:
    """The JSON of a command's last line."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environ})
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def compare(machine: Machine, lab: Path, bench: Path, pair: Pair, case: str, rounds: int, kv_dtype: str) -> Row:
    """All rounds of one case."""
    done: list[Round] = []
    shares = []
    version = ""
    while len(done) < 2 * rounds and len(_counting(machine, done)) < rounds:
        before = machine.look()
        own, share = ours(pair.folder, case, kv_dtype)
        between = machine.look()
        other, version = theirs(lab, bench, pair, case)
        done.append(Round(own, other, (before, between, machine.look())))
        shares.append(share)
        print(f"  {pair.folder.name} {case}: {own.decode:.1f} against {other.decode:.1f}", file=sys.stderr)
    counting = _counting(machine, done) or done
    return Row(
        folder=pair.folder.name,
        peer=pair.peer,
        version=version,
        dtype=pair.dtype,
        case=case,
        ours=_median(round_.ours for round_ in counting),
        theirs=_median(round_.theirs for round_ in counting),
        prefill_ratio=statistics.median(round_.ours.prefill / round_.theirs.prefill for round_ in counting),
        decode_ratio=statistics.median(round_.ours.decode / round_.theirs.decode for round_ in counting),
        bandwidth_share=statistics.median(shares),
        rounds=len(counting),
        run=len(done),
        good=all(machine.good(state) for round_ in counting for state in round_.states),
    )


def _counting(machine: Machine, rounds: Sequence[Round]) -> list[Round]:
    """Those within the good state; if there are none, those within the bad one."""
    good = [round_ for round_ in rounds if all(map(machine.good, round_.states))]
    return good or [round_ for round_ in rounds if not any(map(machine.good, round_.states))]


def _median(samples: Iterator[Sample]) -> Sample:
    taken = list(samples)
    return Sample(statistics.median(s.prefill for s in taken), statistics.median(s.decode for s in taken))


@click.command()
@click.option("--lab", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--bench", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--pair", "pairs", required=True, multiple=True, metavar="FOLDER:PEER:DTYPE", help="Repeatable.")
@click.option("--case", "cases", required=True, multiple=True, metavar="B,P,N", help="Batch, prompt, new; repeatable.")
@click.option("--rounds", default=3, help="Turns of each side that count.")
@click.option("--kv-dtype", default="auto", show_default=True, help="Of our keys and values; peers have their default.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row instead of a table.")
def main(
    lab: Path, bench: Path, pairs: Sequence[str], cases: Sequence[str], rounds: int, kv_dtype: str, as_json: bool
) -> None:
    """Compares speeds with peers."""
    cpus = usable_cpus()
    choose_kernels(threads=len(cpus))  # for the probes
    machine = Machine()
    if not as_json:
        print(
            "| ours | peer | case | prefill tok/s | decode tok/s | prefill ratio | decode ratio | bandwidth | rounds |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
    for pair in map(Pair.parse, pairs):
        for case in cases:
            row = compare(machine, lab, bench, pair, case, rounds, kv_dtype)
            if as_json:
                print(json.dumps(asdict(row)), flush=True)
                continue
            own, other = row.ours, row.theirs
            print(
                f"| {row.folder} | {row.peer} {row.version} {row.dtype} | {row.case} "
                f"| {own.prefill:.0f} / {other.prefill:.0f} | {own.decode:.1f} / {other.decode:.1f} "
                f"| {row.prefill_ratio:.2f}x | {row.decode_ratio:.2f}x | {row.bandwidth_share:.0%} "
                f"| {row.rounds} of {row.run}{'' if row.good else ', bad state'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
