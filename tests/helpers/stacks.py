"""Real stacks for tests: `qwire.stack.Stack` on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from qwire import Client
from qwire.stack import Commands, Stack, StackConfig
from qwire.v1 import admin_pb2, admin_pb2_grpc
from tests.helpers.models import write_random_qwen3
from tests.helpers.tokenizers import added_token, tiny_tokenizer_json, write_tokenizer

FAULTY_WORKER = Commands(worker=(sys.executable, "-m", "tests.helpers.faulty_worker"))
"""Of a stack whose workers can be slowed down, and crash where a prompt says so."""
TINY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_MERGES = ["t h", "th e", "i n", "a n", "e r"]


def write_tiny_model(folder: Path, **shape: object) -> Path:
    """A random Qwen3 with a byte-level vocabulary, <|im_start|>, <|im_end|> (its EOS) and <think>: text comes out as
    random bytes, which is as hostile to a detokenizer as text gets."""
    first = 256 + len(TINY_MERGES)
    added = [
        added_token(first, "<|im_start|>"),
        added_token(first + 1, "<|im_end|>"),
        added_token(first + 2, "<think>", special=False),
    ]
    write_random_qwen3(
        folder,
        vocab=first + 3,
        generation={"eos_token_id": [first + 1]},
        **shape,  # type: ignore[arg-type]
    )
    data = tiny_tokenizer_json(added, TINY_MERGES)
    return write_tokenizer(folder, data, {"chat_template": TINY_TEMPLATE, "eos_token": "<|im_end|>"})


@dataclass
class RunningStack:
    """A stack that is up: its addresses, its processes, and what they logged."""

    stack: Stack
    lines: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.stack.address

    @property
    def pids(self) -> dict[str, int]:
        return self.stack.pids

    def client(self) -> Client:
        return Client(self.address)

    def state(self) -> admin_pb2.GetStateResponse:
        with grpc.insecure_channel(self.stack.admin_address) as channel:
            return admin_pb2_grpc.AdminServiceStub(channel).GetState(admin_pb2.GetStateRequest(), timeout=5)


@contextmanager
def running_stack(
    model: Path, name: str, *, worker_flags: tuple[str, ...] = (), **config: object
) -> Iterator[RunningStack]:
    """Starts a stack on a free port and stops it again."""
    lines: list[str] = []
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="stack")
    thread.start()
    stack = Stack(
        StackConfig(model, name, listen="127.0.0.1:0", worker_flags=worker_flags, **config),  # type: ignore[arg-type]
        log=lines.append,
    )
    try:
        try:
            asyncio.run_coroutine_threadsafe(stack.__aenter__(), loop).result(90)
        except BaseException:
            print("\n".join(lines))
            raise
        try:
            yield RunningStack(stack, lines)
        finally:
            asyncio.run_coroutine_threadsafe(stack.__aexit__(None, None, None), loop).result(60)
            print("\n".join(lines))  # shown for tests that fail
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
