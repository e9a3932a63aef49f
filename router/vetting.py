"""Which workers are let in: those whose ids mean what the tokenizer service takes them for.

A worker of another model, tokenizer or protocol behind an address would give its callers nonsense, so it is kept out,
and looked at again whenever its link is tried.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from qwire.v1 import worker_pb2 as pb

Digest = Callable[[str], Awaitable[str | None]]
"""Of a model's tokenizer, at the tokenizer service; empty where it has no such model, None where it can't be asked."""


async def objection(info: pb.WorkerInfo, digest: Digest) -> str:
    """Why a worker is kept out; empty if it isn't. One that doesn't say which tokenizer it has is let in, and so is any
    while the tokenizer service can't be asked."""
    model = info.model
    if not (model.name and model.vocab_size and model.context_length and info.block_size and info.max_running):
        return "what it says of itself is incomplete: it has another protocol"
    if not model.tokenizer_digest:
        return ""
    expected = await digest(model.name)
    if expected == "":
        return f"the tokenizer service has no model {model.name!r}"
    if expected is not None and expected != model.tokenizer_digest:
        return f"its tokenizer for {model.name!r} is not that of the tokenizer service"
    return ""
