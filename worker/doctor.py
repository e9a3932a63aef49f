"""`python -m worker doctor`: what this machine has and can do, and what the worker would make of it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from worker.kernels import INSTRUCTION_SETS, NativeError, choose_kernels, usable_cpus
from worker.kernels.cpu import native
from worker.limits import Limits, measure


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The findings."""

    cpu: str
    """As the system calls it."""
    cpus: int
    """In all."""
    usable_cpus: int
    """That this process may use, by its affinity and its control group."""
    memory_bytes: int
    instruction_sets: list[str]
    """Of the machine, best first; empty where nothing was compiled that could tell."""
    compiled: list[str]
    """Instruction sets that kernels were compiled for."""
    backend: str
    isa: str
    """What `--backend auto` takes."""
    why: str
    torch: str
    limits: Limits


def diagnose(seconds: float = 0.3) -> Diagnosis:
    """Takes a few seconds: limits are measured."""
    cpus = usable_cpus()
    chosen = choose_kernels(threads=len(cpus))
    torch.set_num_threads(len(cpus))
    return Diagnosis(
        cpu=_cpu_name(),
        cpus=os.cpu_count() or len(cpus),
        usable_cpus=len(cpus),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        instruction_sets=_instruction_sets(),
        compiled=[name for name in INSTRUCTION_SETS if importlib.util.find_spec(f"worker.kernels.cpu._{name}")],
        backend=chosen.kernels.name,
        isa=chosen.kernels.isa,
        why=chosen.why,
        torch=torch.__version__,
        limits=measure(seconds),
    )


def _instruction_sets() -> list[str]:
    try:
        sets: list[str] = native.load("portable")[1].instruction_sets()
    except NativeError:
        return []
    return sets


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _report(found: Diagnosis) -> str:
    limits = found.limits
    int8 = "not measured" if limits.int8_op_per_s is None else f"{limits.int8_op_per_s / 1e9:.0f} GOP/s"
    rows = [
        ("cpu", f"{found.cpu}, {found.cpus} CPUs, {found.usable_cpus} usable"),
        ("memory", f"{found.memory_bytes / 2**30:.1f} GiB"),
        ("instruction sets", ", ".join(found.instruction_sets) or "unknown"),
        ("compiled kernels", ", ".join(found.compiled) or "none"),
        ("backend", f"{found.backend}, {found.isa} ({found.why}), torch {found.torch}"),
        ("reading memory", f"{limits.read_bytes_per_s / 1e9:.1f} GB/s"),
        ("float32", f"{limits.flop_per_s / 1e9:.0f} GFLOP/s"),
        ("int8", int8),
    ]
    return "\n".join(f"{name:<18}{text}" for name, text in rows)


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def doctor_command(as_json: bool) -> None:
    """Measure this machine's limits, and say which kernels would run on it and why."""
    found = diagnose()
    click.echo(json.dumps(asdict(found)) if as_json else _report(found))
