"""What a worker's start takes: from the start of its process to the first token that a client of the router gets.

    python -m benchmarks.start --model FOLDER [--rounds 5] [--kv-cache-mib 512] [--python OTHER/.venv/bin/python]

Router and tokenizer service are up before each start; the client's request waits for the worker. `--python`, several
times if need be, names environments whose workers are started in turn: a machine's speed changes from minute to minute,
a ratio less. Read the model's files before, or the first start reads them from the disk.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from qwire import Client

PROMPT = list(range(1, 9))
"""Any ids will do."""
SERVED = "model"


@dataclass(frozen=True, slots=True)
class Start:
    """One start. `seconds` until the first token; `peak_mib` is of the rank's memory (VmHWM)."""

    seconds: float
    peak_mib: float


@contextmanager
def service(*arguments: str) -> Iterator[None]:
    """A process that is up when the block begins."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        if process.stdout is None or "listening" not in process.stdout.readline():
            raise click.ClickException(f"{arguments[0]} does not start")
        yield
    finally:
        process.terminate()
        process.communicate()


def start(python: str, flags: Sequence[str], router: str) -> Start:
    """Starts a worker, waits for its first token, ends it."""
    begun = time.perf_counter()
    # Without this folder on its path: each environment has a worker of its own.
    worker = subprocess.Popen([python, "-P", "-m", "worker", "serve", *flags], stdout=subprocess.DEVNULL)
    try:
        with Client(router) as client:
            generation = client.generate(token_ids=PROMPT, max_tokens=4, ignore_eos=True, temperature=0)
            next(delta for delta in generation if delta.token_ids)
            seconds = time.perf_counter() - begun
            for _ in generation:
                pass
        rank = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()[0]
        peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{rank}/status").read_text())
        return Start(seconds, int(peak[1]) / 1024 if peak else 0.0)
    finally:
        worker.terminate()
        worker.wait()


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--rounds", default=5)
@click.option("--kv-cache-mib", default=512)
@click.option("--python", "pythons", multiple=True, default=(sys.executable,), help="Whose worker; this one's if none.")
def main(model: str, rounds: int, kv_cache_mib: int, pythons: Sequence[str]) -> None:
    """Times starts of a worker."""
    with tempfile.TemporaryDirectory() as folder:
        sockets = {name: f"unix:{folder}/{name}" for name in ("tokenizer", "router", "admin", "worker")}
        served = "--model", model, "--served-model-name", SERVED
        targets = "--tokenizer", sockets["tokenizer"], "--worker", sockets["worker"], "--worker-wait", "60"
        listen = "--listen", sockets["router"], "--admin-listen", sockets["admin"], "--drain-delay", "0"
        flags = *served, "--kv-cache-mib", str(kv_cache_mib), "--listen", sockets["worker"]
        starts: dict[str, list[Start]] = {python: [] for python in pythons}
        with (
            service("tokenizer_svc", "serve", *served, "--listen", sockets["tokenizer"]),
            service("router", "serve", *targets, *listen),
        ):
            for _ in range(rounds):
                for python, done in starts.items():
                    done.append(start(python, flags, sockets["router"]))
    for python, done in starts.items():
        seconds = sorted(one.seconds for one in done)
        print(
            f"{python}: {statistics.median(seconds):.2f} s to the first token ({seconds[0]:.2f} to {seconds[-1]:.2f}, "
            f"{rounds} starts), {max(one.peak_mib for one in done):.0f} MiB at most"
        )


if __name__ == "__main__":
    main()
