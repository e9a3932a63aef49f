"""Constraints in the real engine on a real model: the same ids whatever else goes on."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from qwire import prefix
from qwire.v1 import generation_pb2 as pb
from tests.constraints.conftest import EOS, VOCAB
from tests.helpers.models import write_random_qwen3
from tests.helpers.threads import one_thread
from worker.constraints.grammars import Grammars
from worker.engine.engine import Engine, StepReport
from worker.engine.plan import SamplingParams
from worker.engine.scheduler import SchedulerLimits
from worker.engine.sequence import EndReason, Request
from worker.runner import TorchRunner

__all__ = ["one_thread"]

Key = tuple[int, int, int]
"""Which constraint, which way of sampling, which choice."""

ROOT = prefix.root(b"m", "float32", 16, "", b"")
SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 999},
        "tag": {"type": "string", "minLength": 1, "maxLength": 3},
        "more": {"type": "array", "items": {"enum": ["the", "true", None]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["id", "tag", "more"],
    "additionalProperties": False,
}
CONSTRAINTS = [
    pb.Constraint(json_schema=json.dumps(SCHEMA)),
    pb.Constraint(regex="(the|[a-f]{3} ){5,9}"),
    pb.Constraint(grammar='start: item (", " item){3,9}\nitem: /[0-9]+/ | "(" item ")"'),
    None,
]
SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=8, repetition_penalty=1.3, frequency_penalty=0.5),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_qwen3(
        tmp_path_factory.mktemp("model") / "m", vocab=VOCAB, layers=1, generation={"eos_token_id": [EOS]}
    )


class Run:
    """An engine that is stepped by hand; the ids of every choice, and why it ended."""

    def __init__(self, folder: Path, num_blocks: int, limits: SchedulerLimits) -> None:
        runner = TorchRunner(folder, num_blocks=num_blocks)
        self.ids: dict[Key, list[int]] = {}
        self.ends: dict[Key, EndReason | None] = {}
        self.engine = Engine(
            runner, limits, max_waiting=99, clock=lambda: 0.0, deliver=lambda report: None, fault=lambda keys: None
        )

    def finish(self) -> None:
        while (report := self.engine.step()) is not None:
            self.take(report)
        self.engine.pool.check()

    def take(self, report: StepReport) -> None:
        for sequence in report.sequences:
            assert isinstance(sequence.key, tuple)
            number, turn = sequence.key
            key = (number, turn, sequence.choice)
            if sequence.drawn.token_id >= 0:
                self.ids.setdefault(key, []).append(sequence.drawn.token_id)
            self.ends[key] = sequence.end


async def requests(grammars: Grammars, generated: dict[Key, list[int]] | None = None) -> list[Request]:
    """Each constraint with each way of sampling, two choices each; begun over, or behind what was generated before."""
    made = []
    for number, constraint in enumerate(CONSTRAINTS):
        for turn, sampling in enumerate(SAMPLING):
            prompt = [(7 * number + turn + i) % 256 for i in range(40)]
            choices = [(generated or {}).get((number, turn, choice), []) for choice in range(2)]
            states = [] if constraint is None else await grammars.begin(constraint, prompt, choices, may_end=True)
            made.append(
                Request(
                    (number, turn),
                    prompt,
                    choices=choices,
                    sampling=sampling,
                    max_tokens=44,
                    constraints=states,
                    eos_ids=frozenset({EOS}),
                    prefix_root=ROOT,
                )
            )
    return made


async def test_the_same_alone_in_company_preempted_and_moved(folder: Path, grammars: Grammars) -> None:
    alone = Run(folder, 64, SchedulerLimits(512, 64))
    for request in await requests(grammars):
        alone.engine.submit(request)
        alone.finish()
    crowded = Run(folder, 24, SchedulerLimits(37, 9))
    for request in await requests(grammars):
        crowded.engine.submit(request)
    crowded.finish()
    assert crowded.engine.scheduler.preemptions
    assert crowded.ids == alone.ids
    assert crowded.ends == alone.ends
    met = [key for key, end in alone.ends.items() if end is EndReason.CONSTRAINT]
    assert {number for number, _, _ in met} >= {0, 1}
    for key in met:
        if CONSTRAINTS[key[0]] is CONSTRAINTS[0]:
            jsonschema.validate(json.loads(_text(alone.ids[key])), SCHEMA)
    guessing = Run(folder, 64, SchedulerLimits(100, 2, max_draft_tokens=7))
    for request in await requests(grammars):
        guessing.engine.submit(request)
    guessing.finish()
    assert guessing.engine.load.accepted_tokens > 20
    assert (guessing.ids, guessing.ends) == (alone.ids, alone.ends)
    # Behind what another worker had generated when it died: each choice another count of ids.
    begun = {key: ids[: 3 + 5 * key[2]] for key, ids in alone.ids.items() if len(ids) > 9}
    moved = Run(folder, 64, SchedulerLimits(64, 16))
    for request in await requests(grammars, begun):
        if all(request.choices):
            moved.engine.submit(request)
    moved.finish()
    assert moved.ids
    for key, ids in moved.ids.items():
        assert begun[key] + ids == alone.ids[key]
        assert moved.ends[key] == alone.ends[key]


def _text(ids: list[int]) -> str:
    words = {256: "th", 257: "the", 258: "tr", 259: "tru", 260: "true"}
    return b"".join(words[token].encode() if token in words else bytes([token]) for token in ids).decode()
