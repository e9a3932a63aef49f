"""Everything at once for a while: `make soak`, or `python -m tests.faults.soak --seconds 1200`.

Two routers, two tokenizer services and three fake workers; clients on our library that ask, and cancel every tenth
request; and every 20 seconds one process is killed, or stopped for a few seconds. Every stream is checked as it ends:
not a token or a byte may differ from what the same request gave before anything was broken, and no request may fail.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc

from qwire import Client, QwireError
from tests.faults.load import Options, Record, References, check, run
from tests.helpers.fleets import Fleet, Service
from tests.helpers.stacks import TINY_MERGES, eventually
from tests.helpers.tokenizers import added_token, tiny_tokenizer_json, write_tokenizer

ROUTERS, TOKENIZERS, WORKERS = 2, 2, 3
CLIENTS = 8
CANCELLED_PART = 0.1
STOP_SECONDS = 5.0
TIMEOUT_SECONDS = 60.0
SAMPLE_SECONDS = 10.0
WARM_SECONDS = 300.0
WORKER_FLAGS = ("--step-ms", "15", "--max-running", "8", "--grace", "1")


def write_model(folder: Path) -> Path:
    """What a tokenizer service and fake workers need of a model: a vocabulary whose text is random bytes."""
    first = 256 + len(TINY_MERGES)
    data = tiny_tokenizer_json([added_token(first, "<|im_start|>"), added_token(first + 1, "<|im_end|>")], TINY_MERGES)
    write_tokenizer(folder, data)
    config = {"vocab_size": first + 2, "max_position_embeddings": 4096, "eos_token_id": first + 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def requests(count: int, seed: int) -> list[Options]:
    """Requests of several kinds, each to be asked for again and again."""
    chance = random.Random(seed)
    found: list[Options] = []
    for number in range(count):
        options: Options = {"max_tokens": chance.randint(20, 200), "seed": number, "temperature": 1.0}
        if number % 4 == 0:
            options |= {"prompt": f"the rain in Spain {number}", "ignore_eos": True}
        else:
            options["token_ids"] = [chance.randrange(250) for _ in range(chance.randint(3, 120))]
        if number % 4 == 1:
            options |= {"n": 2, "min_tokens": 15}
        if number % 4 == 2:
            options |= {"stop": [chr(chance.randint(97, 122))], "min_tokens": 10}
        found.append(options)
    return found


@dataclass
class Tally:
    """What happened."""

    ended: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    moves: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def slope(self, since: float) -> float:
        """Growth of memory in parts of itself every ten minutes, by a straight line through what came after `since`."""
        points = [(when, size) for when, size in self.memory if when >= since]
        if len(points) < 3:
            return 0.0
        middle = sum(when for when, _ in points) / len(points)
        mean = sum(size for _, size in points) / len(points)
        spread = sum((when - middle) ** 2 for when, _ in points)
        return 600 * sum((when - middle) * (size - mean) for when, size in points) / spread / mean


class Soak:
    """The processes, the clients, and whoever breaks things."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.fleet = Fleet(folder)
        self.tally = Tally()
        self.over = threading.Event()
        self._chance = random.Random(seed)
        self._requests = requests(40, seed)
        model = write_model(folder / "model")
        self._model = ("--model", str(model), "--served-model-name", "soak")

    def start(self) -> References:
        """Starts everything, and asks for what each request gives while nothing is broken."""
        for number in range(TOKENIZERS):
            self.fleet.start(f"tokenizer-{number}", "tokenizer_svc", *self._model, listen="127.0.0.1:0")
        for number in range(WORKERS):
            self.fleet.start_worker(number, *self._model, *WORKER_FLAGS)
        tokenizers = [self.fleet.services[name].wait_for_address() for name in self.fleet.named("tokenizer")]
        for number in range(ROUTERS):
            self.fleet.start_router(
                number, "--worker-wait", "30", "--fleet-secret", "soak", tokenizer="ipv4:" + ",".join(tokenizers)
            )
        for service in self.fleet.services.values():
            service.wait_until_serving()
        references = References(Client(self.addresses))
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(references.of, self._requests))
        return references

    @property
    def addresses(self) -> list[str]:
        return [self.fleet.services[name].address for name in self.fleet.named("router")]

    def ask(self, number: int, references: References) -> None:
        """One client: asks, reads or cancels, checks, and again."""
        chance = random.Random(number)
        with Client(self.addresses[number % ROUTERS :] + self.addresses[: number % ROUTERS]) as client:
            while not self.over.is_set():
                options = {**chance.choice(self._requests), "timeout": TIMEOUT_SECONDS}
                if chance.random() < CANCELLED_PART:
                    self._cancel(client, options, chance.randint(1, 30), references)
                    continue
                record = run(client, options, Record(options))
                with self.tally.lock:
                    self.tally.ended[record.statuses[0].name] += 1
                    self.tally.tokens += record.tokens
                    self.tally.moves += sum(finished.placement.moves for finished in record.finished.values())
                self._check(partial(check, [record], references), record)

    def _cancel(self, client: Client, options: Options, after: int, references: References) -> None:
        record, expected = Record(options), references.of(options)
        generation = client.generate(**options)
        try:
            for delta in generation:
                record.ids.setdefault(delta.choice, []).extend(delta.token_ids)
                after -= 1
                if after <= 0:
                    break
            generation.cancel()
        except QwireError as error:
            record.error = error
        with self.tally.lock:
            self.tally.ended["cancelled"] += 1

        def look() -> None:
            assert record.error is None or record.error.code is grpc.StatusCode.CANCELLED, record.error
            for choice, ids in record.ids.items():
                assert ids == expected.ids[choice][: len(ids)], f"ids of choice {choice} of {options}"

        self._check(look, record)

    def _check(self, look: Callable[[], None], record: Record) -> None:
        try:
            look()
        except AssertionError as error:
            with self.tally.lock:
                self.tally.wrong.append(f"{error} {record.error}"[:2000])

    def break_things(self, every: float, seconds: float) -> None:
        """Kills or stops one process after another, and starts what is gone. By the main thread: what a thread has
        started dies with it."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(every, left))
            if left <= every:
                return
            service = self.fleet.services[self._chance.choice(list(self.fleet.services))]
            if self._chance.random() < 0.5:
                self.tally.faults[f"killed a {service.name.partition('-')[0]}"] += 1
                self.fleet.restart(service.name)
            else:
                self.tally.faults[f"stopped a {service.name.partition('-')[0]}"] += 1
                self._stop(service)

    def _stop(self, service: Service) -> None:
        os.kill(service.pid, signal.SIGSTOP)
        try:
            time.sleep(STOP_SECONDS)
        finally:
            os.kill(service.pid, signal.SIGCONT)

    def sample(self) -> None:
        """Notes how much memory all processes take together."""
        began = time.monotonic()
        while not self.over.wait(SAMPLE_SECONDS):
            self.tally.memory.append((time.monotonic() - began, self.fleet.memory))

    def clean(self) -> bool:
        """Whether nothing is held any more."""
        held = ("active_streams", "blocks_in_use", "requests_running", "requests_waiting")
        states = [self.fleet.state(number) for number in range(ROUTERS)]
        return all(getattr(state, name) == 0 for state in states for name in held)


def soak(folder: Path, seconds: float, every: float, seed: int) -> Tally:
    """Runs it all; what was wrong is in the tally."""
    whole = Soak(folder, seed)
    try:
        references = whole.start()
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            running = [pool.submit(whole.ask, number, references) for number in range(CLIENTS)]
            running.append(pool.submit(whole.sample))
            try:
                whole.break_things(every, seconds)
            finally:
                whole.over.set()
            for future in running:
                future.result(120)
        for service in whole.fleet.services.values():
            service.wait_until_serving()
        if not eventually(whole.clean, 20):
            whole.tally.wrong.append(f"left over: {[whole.fleet.state(number) for number in range(ROUTERS)]}")
    finally:
        whole.fleet.stop()
    return whole.tally


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between faults")
    parser.add_argument("--seed", type=int, default=1)
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="qwire-soak-") as name:
        tally = soak(Path(name), parsed.seconds, parsed.every, parsed.seed)
    slope = tally.slope(min(WARM_SECONDS, parsed.seconds / 4))
    print(f"ended: {dict(tally.ended)}; tokens: {tally.tokens}; moves: {tally.moves}; faults: {dict(tally.faults)}")
    print(f"memory: {tally.memory[-1][1] / 2**20 if tally.memory else 0:.0f} MiB, {100 * slope:+.2f} % in 10 minutes")
    for wrong in tally.wrong[:10]:
        print(f"wrong: {wrong}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
