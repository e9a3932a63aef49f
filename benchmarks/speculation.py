"""What guessing ids brings and costs: the engine with and without, in turn, on one model; medians of ratios.

    python -m benchmarks.speculation [--model FOLDER] [--quantize int8] [--batch 1 ...] [--rounds 3] [--json]

Cases, each greedy unless said otherwise:

- rewrite: the model is asked to write a text again with one word changed (needs a tokenizer and a model that can), and
  ends when it is done;
- answer: it answers questions, greedily and at temperature 1 (needs a tokenizer), and goes on when it is done;
- copy: the output is held to the prompt's own ids, one of them changed, by a constraint that allows a single id at each
  position. Whatever the weights are: the forward pass, the masks and the draws are those of any request;
- random: random prompts, drawn at temperature 1;
- misleading: held to ids of which the last two have always come before, and behind them never the one that comes now:
  every guess is wrong. The worst that there is.

Both sides must give the same ids and log-probabilities.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import tokenizers
import torch

from qwire import hub, prefix
from worker.config import WorkerConfig
from worker.engine.constraint import ConstraintState, Standing, TokenMask
from worker.engine.engine import Engine, StepReport
from worker.engine.plan import Clock, SamplingParams
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import Request
from worker.kernels import QUANTIZED_FORMATS, choose_kernels, pin_threads, usable_cpus
from worker.model import ModelConfig
from worker.runner.runner import TorchRunner

NEW = 128
TEXTS = (
    "The harbour was quiet that morning. Two boats lay at the quay, and an old man was mending a net on the "
    "larger one. He looked up when the children came running down the hill, waved his hand, and went on with "
    "his work. The wind had turned during the night, so nobody expected the ferry before noon.",
    "Our library opens at nine on weekdays and at ten on Saturdays. Members may borrow up to six books for "
    "three weeks, and they may renew them twice. Please return what you have borrowed at the desk by the main "
    "entrance, or drop it into the box outside when the building is closed.",
    "To make the dough, mix the flour with a little salt and warm water, then knead it for ten minutes until "
    "it is smooth. Cover it with a cloth and let it rest in a warm place for an hour. Roll it out as thin as "
    "you can, brush it with oil, and bake it on a hot stone until the edges are brown.",
)
CHANGED = (("ferry", "train"), ("library", "museum"), ("dough", "paste"))
QUESTIONS = (
    "Why is the sky blue?",
    "Tell me a short story about a fox and a river.",
    "How do I keep bread fresh for a week?",
)
SAMPLED = SamplingParams(temperature=1.0, seed=1)


@dataclass(frozen=True, slots=True)
class Only:
    """A `TokenMask` of one id."""

    token: int | None

    def bits(self) -> bytes:
        if self.token is None:
            return b""
        mask = bytearray(self.token // 8 + 1)
        mask[self.token // 8] = 1 << self.token % 8
        return bytes(mask)


class Script:
    """A `ConstraintState` that allows one id at each position."""

    def __init__(self, ids: Sequence[int], done: int = 0) -> None:
        self._ids, self._done = ids, done

    def mask(self) -> TokenMask:
        return Only(self._ids[self._done])

    def masks_behind(self, ids: Sequence[int]) -> list[TokenMask]:
        right = [self._ids[self._done : self._done + count] == list(ids[:count]) for count in range(1, len(ids) + 1)]
        left = len(self._ids) - self._done
        return [Only(self._ids[self._done + n] if ok and n < left else None) for n, ok in enumerate(right, 1)]

    def advance(self, token: int) -> Standing:
        self._done += 1
        return Standing.OPEN

    def undrawn(self) -> Standing:
        return Standing.STUCK

    def fork(self) -> ConstraintState:
        return Script(self._ids, self._done)


@dataclass(frozen=True)
class Case:
    name: str
    prompts: list[list[int]]
    scripts: list[list[int]] = field(default_factory=list)
    """What each output is held to, if anything."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Turn:
    tok_per_s: float
    """Ids drawn by steps that computed no prompt, over their time."""
    ids: dict[int, list[int]]
    logprobs: dict[int, list[float | None]]
    drafted: int
    accepted: int


def scripted(name: str, batch: int, vocab: int, script: Callable[[random.Random, list[int]], list[int]]) -> Case:
    draw = random.Random(batch)
    prompts = [[draw.randrange(1000, vocab) for _ in range(NEW + 16)] for _ in range(batch)]
    return Case(name, prompts, [script(draw, prompt) for prompt in prompts])


def copied(draw: random.Random, prompt: list[int]) -> list[int]:
    script = prompt[:NEW]
    script[NEW // 2] = draw.randrange(1000)
    return script


def misleading(draw: random.Random, prompt: list[int]) -> list[int]:
    """Over two dozen ids, so that pairs come again and again; the id behind a pair is one that was never there."""
    few, tokens = prompt[:24], list(prompt)
    for first in few:
        for second in few:
            tokens += [first, second, draw.randrange(1000)]
    prompt[:] = tokens
    said = set(zip(tokens, tokens[1:], tokens[2:], strict=False))
    script: list[int] = [few[0], few[1]]
    while len(script) < NEW:
        script.append(next(token for token in draw.sample(few, 24) if (*script[-2:], token) not in said))
        said.add((script[-3], script[-2], script[-1]))
    return script


def cases(folder: Path, batch: int, config: ModelConfig) -> list[Case]:
    found = [
        scripted("copy", batch, config.vocab_size, copied),
        Case("random", scripted("", batch, config.vocab_size, copied).prompts, sampling=SAMPLED),
        scripted("misleading", batch, config.vocab_size, misleading),
    ]
    if (folder / "tokenizer.json").exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

        def chat(text: str, answer: str = "") -> list[int]:
            text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{answer}"
            ids: list[int] = tokenizer.encode(text).ids
            return ids

        turns = [
            chat(f"{text}\n\nRepeat the text above word for word, with {old} changed to {new}.", text[:16])
            for text, (old, new) in zip(TEXTS, CHANGED, strict=True)
        ]
        asked = [chat(question) for question in QUESTIONS]
        found.append(
            Case("rewrite", [turns[i % len(turns)] for i in range(batch)], eos_ids=frozenset(config.eos_token_ids))
        )
        found.append(Case("answer", [asked[i % len(asked)] for i in range(batch)]))
        found.append(Case("answer, t=1", [asked[i % len(asked)] for i in range(batch)], sampling=SAMPLED))
    return found


def turn(runner: TorchRunner, case: Case, new: int, drafts: int, clock: Clock) -> Turn:
    engine = Engine(
        runner,
        SchedulerLimits(2048, len(case.prompts), max_draft_tokens=drafts),
        max_waiting=len(case.prompts),
        clock=clock,
        deliver=_ignore,
        fault=lambda keys: None,
    )
    root = prefix.root(b"bench", "", runner.block_size, "", b"")
    for number, prompt in enumerate(case.prompts):
        given = case.sampling
        engine.submit(
            Request(
                number,
                prompt,
                sampling=SamplingParams(given.temperature, seed=given.seed + number, logprobs=0),
                max_tokens=new,
                eos_ids=case.eos_ids,
                constraints=[Script(case.scripts[number])] if case.scripts else (),
                prefix_root=root,
                use_prefix_cache=False,
            )
        )
    ids: dict[int, list[int]] = {number: [] for number in range(len(case.prompts))}
    values: dict[int, list[float | None]] = {number: [] for number in ids}
    seconds, drawn = 0.0, 0
    while True:
        decoding = all(ids.values())
        start = clock()
        report = engine.step()
        if decoding:
            seconds += clock() - start
        if report is None:
            break
        drawn += len(report.sequences) if decoding else 0
        for sequence in report.sequences:
            assert isinstance(sequence.key, int)
            ids[sequence.key].append(sequence.drawn.token_id)
            values[sequence.key].append(sequence.drawn.logprob)
    return Turn(drawn / seconds, ids, values, engine.load.drafted_tokens, engine.load.accepted_tokens)


def compare(
    runner: TorchRunner, case: Case, new: int, drafts: int, rounds: int, clock: Clock = time.perf_counter
) -> dict[str, object]:
    """Rounds of one turn each, behind one to warm up; raises RuntimeError where the sides differ."""
    turn(runner, case, 4, drafts, clock)
    plain, ratios = [], []
    for number in range(rounds):
        sides = {count: turn(runner, case, new, count, clock) for count in ((0, drafts) if number % 2 else (drafts, 0))}
        with_ = sides[drafts]
        if (sides[0].ids, sides[0].logprobs) != (with_.ids, with_.logprobs):
            raise RuntimeError(f"{case.name}: the output is not the same")
        plain.append(sides[0].tok_per_s)
        ratios.append(with_.tok_per_s / sides[0].tok_per_s)
    return {
        "case": case.name,
        "batch": len(case.prompts),
        "tok_per_s_without": statistics.median(plain),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "generated": sum(map(len, with_.ids.values())),
        "drafted": with_.drafted,
        "accepted": with_.accepted,
    }


def _ignore(report: StepReport) -> None:
    """A benchmark reads what `step` returns."""


@click.command()
@click.option("--model", default=hub.DEMO, help="Folder, hub id or demo.")
@click.option("--quantize", type=click.Choice(["none", *QUANTIZED_FORMATS]), default="none", help="As of serve.")
@click.option("--dtype", default="auto", help="As of serve.")
@click.option("--batch", "batches", multiple=True, default=(1, 8), help="Sequences at once; repeatable.")
@click.option("--case", "names", multiple=True, help="Only these; repeatable.")
@click.option("--speculation", "drafts", default=WorkerConfig.speculation, help="As of serve.")
@click.option("--new", type=click.IntRange(8, NEW), default=NEW, help="Tokens of each sequence.")
@click.option(
    "--cpu-time",
    is_flag=True,
    help="Measure this process's CPU time, on one thread: for a machine that others keep busy.",
)
@click.option("--rounds", default=3, help="Turns of each side.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row instead of a table.")
def main(
    model: str,
    quantize: str,
    dtype: str,
    batches: Sequence[int],
    names: Sequence[str],
    drafts: int,
    new: int,
    cpu_time: bool,
    rounds: int,
    as_json: bool,
) -> None:
    """Compares decode speed with and without speculation."""
    folder, cpus = hub.resolve(model, sys.stderr), usable_cpus()
    if cpu_time:
        cpus = cpus[:1]
    chosen = choose_kernels(threads=len(cpus))
    torch.set_num_threads(1 if chosen.kernels.name == "cpu" else len(cpus))
    blocks = max(batches) * 128
    runner = TorchRunner(folder, num_blocks=blocks, dtype=dtype, quantize=quantize, kernels=chosen.kernels)
    if not cpu_time:
        pin_threads(chosen.kernels, cpus)
    if not as_json:
        print(f"{folder.name}, {runner.dtype}, {runner.quantization}, {runner.kernels.name} {runner.kernels.isa}")
        print(
            f"{'case':<14}{'batch':>6}{'tok/s without':>15}{'ratio':>7}{'guessed':>9}{'kept':>7}{'of':>7}", flush=True
        )
    for batch in batches:
        for case in cases(folder, batch, runner.config):
            if names and case.name not in names:
                continue
            row = compare(runner, case, new, drafts, rounds, time.process_time if cpu_time else time.perf_counter)
            if as_json:
                print(json.dumps(row), flush=True)
                continue
            print(
                f"{row['case']:<14}{row['batch']:>6}{row['tok_per_s_without']:>15.1f}{row['ratio']:>7.2f}"
                f"{row['drafted']:>9}{row['accepted']:>7}{row['generated']:>7}   "
                + " ".join(f"{ratio:.2f}" for ratio in row["ratios"]),  # type: ignore[attr-defined]
                flush=True,
            )


if __name__ == "__main__":
    main()
