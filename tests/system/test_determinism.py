"""Forty requests of every kind, one by one on a worker that has nothing else to do; then all at once, among others that
come and go, on one of the same numerics with other blocks, threads and chunks, too little memory, a prefix cache that
some use and some don't, and guesses: ids, text and log-probabilities are the same to the last bit."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwire import Client, QwireError
from tests.helpers.stacks import RunningStack, eventually, running_stack

Options = dict[str, Any]
Output = list[tuple[list[int], str, list[bytes], int]]

DTYPES = {
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--dtype", "bfloat16", "--quantize", "int8", "--kv-dtype", "int8"),
}
QUIET = ("--speculation", "0", "--threads", "1", "--kv-cache-mib", "64")
_TIGHT = ("--kv-blocks", "22", "--block-size", "32", "--max-step-tokens", "53", "--max-running", "14")
CROWDED = ("--speculation", "9", "--threads", "2", *_TIGHT)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "id": {"type": "integer", "minimum": 0, "maximum": 999},
            "kind": {"enum": ["the inner", "the other"]},
            "list": {"type": "array", "items": {"enum": ["the", "in", "the inner"]}, "minItems": 2, "maxItems": 5},
        },
        "required": ["id", "kind", "list"],
        "additionalProperties": False,
    }
)
CONSTRAINTS: list[Options] = [
    {"json_schema": SCHEMA},
    {"regex": "((the|in|an) ){9}end"},
    {"grammar": 'start: item (", " item){2,9}\nitem: /[0-9]+/ | "(" item ")"'},
    {"choice": ["the inner and the outer", "the inner and the other", "an end"]},
]


@dataclass
class Pair:
    quiet: RunningStack
    crowded: RunningStack


@pytest.fixture(scope="module", params=sorted(DTYPES))
def pair(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Pair]:
    flags = DTYPES[request.param]
    with (
        running_stack(tiny_model, "tiny", worker_flags=(*QUIET, *flags)) as quiet,
        running_stack(tiny_model, "tiny", worker_flags=(*CROWDED, *flags)) as crowded,
    ):
        yield Pair(quiet, crowded)


def requests() -> list[Options]:
    """Prompts share beginnings of many lengths, and repeat themselves."""
    draw = random.Random(5)
    stem = [draw.randrange(97, 123) for _ in range(70)]

    def prompt() -> list[int]:
        own = [draw.randrange(97, 123) for _ in range(draw.randrange(1, 12))]
        return [*stem[: draw.randrange(70)], *own * draw.randrange(1, 4)]

    found: list[Options] = [{"temperature": 0, "ignore_eos": True} for _ in range(10)]
    found += [
        {"temperature": draw.choice([0.4, 0.9, 1.4]), "seed": seed, "top_k": draw.choice([0, 9, 40]), "top_p": 0.95}
        for seed in range(10)
    ]
    for kind in CONSTRAINTS:
        found += [{**kind, "temperature": 0}, {**kind, "temperature": 1.1, "seed": 4, "frequency_penalty": 0.3}]
    found += [{"n": 3, "temperature": 1.0, "seed": seed, "ignore_eos": True} for seed in range(4)]
    found += [{"n": 3, "temperature": 0.7, "seed": seed, "min_p": 0.02, **CONSTRAINTS[seed]} for seed in range(2)]
    for seed in range(6):
        penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "bad_words": ["the", "a"], "min_tokens": 20}
        found.append({**penalties, "temperature": 0.8 * (seed % 2), "seed": seed, "logit_bias": {101: 1.5}})
    return [{**options, "token_ids": prompt(), "max_tokens": 36, "logprobs": 2} for options in found]


def output(client: Client, options: Options) -> Output:
    generation = client.generate(**options).read()
    return [
        (
            choice.token_ids,
            choice.text,
            [item.SerializeToString(deterministic=True) for item in choice.logprobs],
            choice.finished.reason if choice.finished is not None else 0,
        )
        for choice in generation.choices.values()
    ]


def test_alone_and_in_any_company(pair: Pair) -> None:
    every = requests()
    assert len(every) == 40
    with pair.quiet.client() as client:
        alone = [output(client, options) for options in every]
        numerics = client.model().numerics_id
    assert len({str(outputs) for outputs in alone}) == 40
    with pair.crowded.client() as client:
        assert client.model().numerics_id == numerics

        def company(seed: int) -> None:
            """Somebody else's request, given up in the middle."""
            draw = random.Random(seed)
            ids = [draw.randrange(97, 123) for _ in range(draw.randrange(1, 200))]
            try:
                for index, _ in enumerate(client.generate(token_ids=ids, max_tokens=60, seed=seed)):
                    if index > draw.randrange(60):
                        break
            except QwireError as error:
                raise AssertionError(f"a neighbour failed: {error}") from error

        for turn in range(2):
            draw = random.Random(turn)
            order = list(range(40))
            draw.shuffle(order)
            with ThreadPoolExecutor(52) as pool:
                beside = [pool.submit(company, 100 * turn + number) for number in range(12)]
                calls = {
                    index: pool.submit(output, client, {**every[index], "bypass": draw.random() < 0.4})
                    for index in order
                }
                for index, call in calls.items():
                    assert call.result() == alone[index], every[index]
                for neighbour in beside:
                    neighbour.result()
        assert pair.crowded.state().preemptions > 0
        # Few at once, where guessing pays.
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(lambda options: output(client, options), every)) == alone
        assert pair.crowded.state().accepted_tokens > 0
        assert eventually(lambda: pair.crowded.state().blocks_in_use == 0, 5)
    assert pair.quiet.state().drafted_tokens == 0
