"""One router on one core: `python -m benchmarks.router [SCENARIO...]`.

The router has a core to itself; fake workers, clients and the tokenizer service share the other. Ids carry the time at
which they were drawn, so ages are measured from the worker's step to the client's read, everything between included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.stamping_worker import STAMPS
from qwire import _child
from tests.helpers.fleets import Fleet, Service
from tests.helpers.tokenizers import tiny_tokenizer_json, write_tokenizer

ROUTER_CORE, OTHER_CORE = 0, 1
START_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load. Steps take `step_ms` at least, so streams get up to 1000 / step_ms tokens a second."""

    streams: int
    step_ms: float
    text: bool = False
    routers: int = 1
    workers: int = 2
    worker: str = "benchmarks.stamping_worker"
    seconds: float = 8.0


SCENARIOS = {
    "ids": Scenario(160, 23),
    "text": Scenario(160, 23, text=True),
    "slow-ids": Scenario(50, 25),
    "saturated": Scenario(512, 19, worker="benchmarks.frame_worker"),
    "saturated-text": Scenario(512, 19, text=True, worker="benchmarks.frame_worker"),
    "two-routers": Scenario(160, 23, routers=2),
}


class Clients:
    """A process of light clients, whose streams have all begun."""

    def __init__(self, addresses: Sequence[str], streams: int, seconds: float, *flags: str) -> None:
        argv = [sys.executable, "-m", "benchmarks.router_clients", *addresses, "--streams", str(streams)]
        argv = ["taskset", "--cpu-list", str(OTHER_CORE), *argv, "--seconds", str(seconds), *flags]
        self._process = subprocess.Popen(
            _child.command(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise RuntimeError("the clients didn't start")

    def measure(self) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("stop\n")
        self._process.wait(30)


def write_vocabulary(folder: Path) -> Path:
    """A tokenizer whose ids, one for each stamp, stand for a few letters each."""
    data = tiny_tokenizer_json()
    vocabulary = data["model"]["vocab"]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEF"
    for number in range(STAMPS - len(vocabulary)):
        vocabulary["".join(letters[number >> shift & 31] for shift in (10, 5, 0)) + "x"] = len(vocabulary)
    write_tokenizer(folder, data)
    (folder / "config.json").write_text(json.dumps({"vocab_size": STAMPS, "max_position_embeddings": 32_768}))
    return folder


def start(folder: Path, scenario: Scenario) -> tuple[Fleet, list[Service]]:
    """Starts what a scenario needs, and waits for it; returns the fleet and its routers."""
    fleet = Fleet(folder)
    model = ("--model", str(write_vocabulary(folder / "model")), "--served-model-name", "fake")
    running = -(-scenario.streams // scenario.workers) + 64
    flags = ("--step-ms", str(scenario.step_ms), "--token-us", "0", "--max-running", str(running))
    blocks = ("--kv-blocks", str(running * 1024), "--max-step-tokens", str(8 * running))
    if scenario.text:
        fleet.start("tokenizer", "tokenizer_svc", *model, core=OTHER_CORE)
    for number in range(scenario.workers):
        fleet.start_worker(number, *model, *flags, *blocks, core=OTHER_CORE, module=scenario.worker)
    for number in range(scenario.routers):
        fleet.start_router(number, "--placement", "least-loaded", core=ROUTER_CORE)
    for service in fleet.services.values():
        service.wait_until_serving()
    return fleet, [fleet.services[name] for name in fleet.named("router")]


def measure(scenario: Scenario) -> dict[str, float]:
    """What the clients saw, and what it cost the routers."""
    with tempfile.TemporaryDirectory(prefix="qwire-bench-") as name:
        fleet, routers = start(Path(name), scenario)
        try:
            addresses = [router.address for router in routers]
            empty = sum(router.memory for router in routers)
            clients = Clients(addresses, scenario.streams, scenario.seconds, *(["--text"] if scenario.text else []))
            others = [service for service in fleet.services.values() if service not in routers]
            before = [service.cpu_seconds for service in (*routers, *others)]
            found = clients.measure()
            after = [service.cpu_seconds for service in (*routers, *others)]
            spent = [end - begin for begin, end in zip(before, after, strict=True)]
            cpu = sum(spent[: len(routers)])
            found["kb_a_stream"] = (sum(router.memory for router in routers) - empty) / 1000 / scenario.streams
            for service, seconds in zip(others, spent[len(routers) :], strict=True):
                found[f"{service.name}_core"] = seconds / found["seconds"]
            clients.stop()
        finally:
            fleet.stop()
    found["router_core"] = cpu / found["seconds"]
    found["us_a_delta"] = 1e6 * cpu / found["deltas"]
    found["deltas_a_second"] = found["deltas"] / found["seconds"]
    found["tokens_a_second"] = found["tokens"] / found["seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--seconds", type=float)
    arguments = parser.parse_args()
    for name in arguments.scenarios:
        scenario = SCENARIOS[name]
        if arguments.seconds:
            scenario = replace(scenario, seconds=arguments.seconds)
        found = measure(scenario)
        print(name, json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
