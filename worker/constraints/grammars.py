"""Grammars of one model: checked, compiled, kept, and handed out as states to begin from."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import llguidance

from qwire.v1 import generation_pb2 as pb
from worker.constraints.helper import CheckFailed, CheckHelper
from worker.constraints.limits import CACHE_BYTES, CACHE_ENTRIES, MAX_PENDING, MAX_TEXT_BYTES, STACK_BYTES
from worker.constraints.process import limits, plain_words
from worker.constraints.state import GrammarState, Vocabulary
from worker.engine.constraint import Standing

log = logging.getLogger(__name__)

NUMERICS_VERSION = 1
"""To be counted up whenever the same constraint gives other masks than before, llguidance's own version aside."""

_MASK_THREADS = 2
_NICENESS = 10
_LEAST_BYTES = 4096
"""What a kept grammar counts at least: its text is kept, too."""


class ConstraintRefused(Exception):
    """A constraint that can't be used.

    Attributes:
        field: its path in GenerateRequest.
        detail: what is wrong, for whoever sent it.
    """

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field} {detail}")
        self.field, self.detail = field, detail


class TooManyPending(Exception):
    """As many constraints as may are being compiled."""


@dataclass(frozen=True, slots=True)
class _Compiled:
    matcher: llguidance.LLMatcher | None
    """At the start; never advanced, only copied. None for what is refused."""
    refused: str
    size: int


class Grammars:
    """Compiles constraints for a model's vocabulary. Lives on the event loop, whose thread it never keeps busy.

    Args:
        tokenizer: the content of tokenizer.json.
        vocab_size: rows of the model's output layer.
        end_ids: ids that end the model's answer; empty takes the tokenizer's own.

    Raises ValueError for a tokenizer that the library can't read. Takes a second or two, and the GIL, at 150,000 ids.
    """

    def __init__(self, tokenizer: str, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = llguidance.LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(end_ids) or None)
        ends = frozenset(token for token in self._tokenizer.eos_tokens if token < vocab_size)
        free = bytearray(b"\xff" * -(-vocab_size // 8))
        for token in ends:
            free[token // 8] &= ~(1 << token % 8) & 0xFF
        self._vocabulary = Vocabulary(vocab_size, ends, bytes(free), self._thinking())
        self._helper = CheckHelper()
        self._compiler = _threads(1, "grammar compiler", nice=True)
        self._masks = _threads(_MASK_THREADS, "grammar masks")
        self._kept: OrderedDict[bytes, _Compiled] = OrderedDict()
        self._kept_bytes = 0
        self._running: dict[bytes, asyncio.Task[_Compiled]] = {}
        self._pending = 0

    @classmethod
    def of(cls, folder: Path, vocab_size: int, end_ids: Sequence[int]) -> Grammars | None:
        """Grammars for a model folder; None where it has no tokenizer.json that the library reads."""
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            return cls(path.read_text(encoding="utf-8"), vocab_size, end_ids)
        except ValueError as error:
            log.warning("no constraints with %s: %s", path, error)
            return None

    async def close(self) -> None:
        """Ends threads and helper process."""
        await self._helper.close()
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._masks.shutdown(wait=False)

    async def begin(
        self, constraint: pb.Constraint, prompt_ids: Sequence[int], choices: Sequence[Sequence[int]], *, may_end: bool
    ) -> list[GrammarState]:
        """A state for each choice, behind the ids that it has.

        Args:
            may_end: whether the ids that end an answer may be drawn where the constraint allows an end.

        Raises:
            ConstraintRefused: the constraint can't be used, by nobody.
            TooManyPending: not now.
        """
        kind = constraint.WhichOneof("kind")
        if kind is None:
            raise ConstraintRefused("constraint", "must be set: json_schema, json_object, regex, grammar or choice")
        think = self._vocabulary.think
        if constraint.free_thinking and think is None:
            raise ConstraintRefused("constraint.free_thinking", "needs a model with the tokens <think> and </think>")
        if self._pending >= MAX_PENDING:
            raise TooManyPending
        self._pending += 1
        try:
            compiled = await self._compiled(constraint, kind)
            if compiled.matcher is None:
                raise ConstraintRefused(f"constraint.{kind}", compiled.refused)
            free = may_think = False
            if constraint.free_thinking and think is not None:
                marks = [token for token in prompt_ids if token in think]
                free = bool(marks) and marks[-1] == think[0]
                may_think = not free
            start = GrammarState(
                compiled.matcher, self._vocabulary, self._masks, may_end=may_end, free=free, may_think=may_think
            )
            states = [start.fork() for _ in choices]
            if any(choices):
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._compiler, _replay, states, choices)
            return states
        finally:
            self._pending -= 1

    async def _compiled(self, constraint: pb.Constraint, kind: str) -> _Compiled:
        text: str = getattr(constraint, kind) if kind in ("json_schema", "regex", "grammar") else ""
        request: dict[str, object] = {"kind": kind, "text": text, "texts": list(constraint.choice.texts)}
        if sum(len(part.encode()) for part in (text, *constraint.choice.texts)) > MAX_TEXT_BYTES:
            raise ConstraintRefused(f"constraint.{kind}", f"must be at most {MAX_TEXT_BYTES} bytes")
        key = hashlib.sha256(constraint_key(constraint)).digest()
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return kept
        if key not in self._running:
            task = self._running[key] = asyncio.create_task(self._compile(request))
            task.add_done_callback(lambda done: self._finish(key, done))
        return await asyncio.shield(self._running[key])

    async def _compile(self, request: dict[str, object]) -> _Compiled:
        try:
            reply = await self._helper.check(request)
        except CheckFailed as error:
            return _Compiled(None, str(error), _LEAST_BYTES)
        if "refused" in reply:
            return _Compiled(None, str(reply["refused"]), _LEAST_BYTES)
        size = int(reply["bytes"]) + _LEAST_BYTES
        loop = asyncio.get_running_loop()
        matcher, refused = await loop.run_in_executor(self._compiler, self._build, str(reply["grammar"]))
        return _Compiled(matcher, refused, size)

    def _build(self, grammar: str) -> tuple[llguidance.LLMatcher | None, str]:
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # what the first mask builds, every copy then has
        if matcher.is_error():
            reason = matcher.get_error()
            return None, "allows no output" if reason.startswith("NoExtension") else (
                f"can't be followed: {plain_words(reason)}"
            )
        return matcher, ""

    def _finish(self, key: bytes, task: asyncio.Task[_Compiled]) -> None:
        del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return
        compiled = task.result()
        self._kept[key] = compiled
        self._kept_bytes += compiled.size
        while self._kept_bytes > CACHE_BYTES or len(self._kept) > CACHE_ENTRIES:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.size

    def _thinking(self) -> tuple[int, int] | None:
        ids = [self._tokenizer.tokenize_str(mark, parse_special=True) for mark in ("<think>", "</think>")]
        return (ids[0][0], ids[1][0]) if all(len(found) == 1 for found in ids) else None


def numerics() -> str:
    """What masks depend on besides constraint and vocabulary."""
    return f"grammars {NUMERICS_VERSION} llguidance {importlib.metadata.version('llguidance')}"


def constraint_key(constraint: pb.Constraint) -> bytes:
    """What makes two constraints one grammar."""
    bare = pb.Constraint()
    bare.CopyFrom(constraint)
    bare.ClearField("free_thinking")
    key: bytes = bare.SerializeToString(deterministic=True)
    return key


def _replay(states: Sequence[GrammarState], choices: Sequence[Sequence[int]]) -> None:
    for state, ids in zip(states, choices, strict=True):
        if state.replay(ids) is Standing.FAILED:
            raise ConstraintRefused("constraint", "can't be followed over what was generated so far")


def _threads(count: int, name: str, *, nice: bool = False) -> ThreadPoolExecutor:
    """Threads with room for the library's recursion, all of them started."""
    started = threading.Barrier(count + 1)

    def begin() -> None:
        if nice:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # on Linux, of this thread alone

    before = threading.stack_size(STACK_BYTES)
    try:
        executor = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=begin)
        for _ in range(count):
            executor.submit(started.wait)
        started.wait()
    finally:
        threading.stack_size(before)
    return executor
