from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.load import Options, References
from tests.faults.processes import wait_for_workers
from tests.helpers.faulty_worker import BRAKE
from tests.helpers.stacks import FAULTY_WORKER, RunningStack, running_stack, write_tiny_model

FLAGS = ("--kv-cache-mib", "64", "--threads", "1", "--max-running", "6", "--grace", "1")
SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 1000}, "minItems": 40, "maxItems": 45}
NESTED = 'start: item (", " item){40,60}\nitem: /[0-9]{2,4}/ | "(" item ")"'
TOKENS = 180
"""Long enough to be hit in the middle, under the brake for seconds."""


@pytest.fixture(scope="package")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("faults") / "tiny")


@pytest.fixture(scope="package")
def brake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that slows the workers of `pair` down while it is there."""
    return tmp_path_factory.mktemp("brake") / "on"


@pytest.fixture
def braked(brake: Path) -> Iterator[None]:
    """Streams of `pair` outlast the test."""
    brake.touch()
    yield
    brake.unlink()


@pytest.fixture(scope="module")
def pair(tiny_model: Path, brake: Path) -> Iterator[RunningStack]:
    """Two workers behind a router."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BRAKE, str(brake))
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
def references(pair: RunningStack) -> Iterator[References]:
    with pair.client() as client:
        yield References(client)


@pytest.fixture(scope="module")
def mixed(references: References) -> list[Options]:
    """Requests of every kind that has state to rebuild: greedy, seeded, choices, penalties, stop strings, a text,
    constraints."""
    long: Options = {"max_tokens": TOKENS, "ignore_eos": True}
    free = {"token_ids": [9, 8, 7], "seed": 3, "temperature": 1.0, **long}
    text = references.of(free).text[0]
    requests: list[Options] = [
        {"token_ids": [1, 2, 3], "temperature": 0, **long},
        {"token_ids": [4, 5, 6], "seed": 11, "temperature": 0.9, "top_k": 40, "logprobs": 1, **long},
        {"token_ids": [7, 8, 9], "seed": 5, "temperature": 1.2, "n": 2, "min_tokens": 40, "max_tokens": TOKENS},
        {
            "token_ids": [2, 4, 6],
            "seed": 6,
            "temperature": 0.7,
            "repetition_penalty": 1.3,
            "frequency_penalty": 0.5,
            "presence_penalty": 0.4,
            "bad_words": ["the"],
            **long,
        },
        # A stop string that is found late, and lies across tokens: it is a few characters of random bytes.
        {**free, "stop": [text[-24:-18]]},
        {"prompt": "the rain in Spain", "seed": 8, "temperature": 1.0, **long},
        # Row 3: a format of each kind that keeps a state, long enough to be hit within it.
        {"token_ids": [3, 1], "seed": 2, "temperature": 1.1, "json_schema": SCHEMA, "max_tokens": 2 * TOKENS},
        {"token_ids": [3, 2], "temperature": 0, "regex": "(the|[a-e]{2} ){60,90}!", "max_tokens": 2 * TOKENS},
        {"token_ids": [3, 3], "seed": 4, "temperature": 0.9, "grammar": NESTED, "max_tokens": TOKENS},
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        list(pool.map(references.of, requests))
    return requests
