"""A server whose Generate stream follows a script: what the clients' tests talk to."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc

from qwire.errors import QwireError
from qwire.v1 import generation_pb2 as gen
from qwire.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc, tokenizer_pb2_grpc
from qwire.v1 import tokenizer_pb2 as tok


@dataclass(frozen=True)
class Hang:
    """A step of the script: wait until the caller goes away."""


Step = gen.GenerateResponse | QwireError | Hang


def accepted(**values: Any) -> gen.GenerateResponse:
    return gen.GenerateResponse(accepted=gen.Accepted(request_id="r1", prompt_tokens=3, **values))


def delta(index: int, ids: Sequence[int], offset: int, text: str, choice: int = 0) -> gen.GenerateResponse:
    return gen.GenerateResponse(
        delta=gen.Delta(choice=choice, token_index=index, token_ids=ids, text_offset=offset, text=text)
    )


def finished(generated: int, choice: int = 0) -> gen.GenerateResponse:
    usage = gen.Usage(prompt_tokens=3, generated_tokens=generated)
    return gen.GenerateResponse(finished=gen.Finished(choice=choice, reason=gen.FINISH_REASON_EOS, usage=usage))


def whole_stream() -> list[Step]:
    """An answer of four tokens with a character of two bytes, and text that is held back until the end."""
    return [accepted(), delta(0, [10], 0, "Hé"), delta(1, [11, 12], 3, "llo"), delta(3, [13], 6, ""),
            delta(4, [], 6, "!"), finished(4)]  # fmt: skip


@dataclass
class FakeServer:
    """Serves the next of `scripts` to every Generate call, `script` to those after the last one, and records what it
    was asked. A context manager."""

    script: Sequence[Step] = field(default_factory=whole_stream)
    scripts: list[Sequence[Step]] = field(default_factory=list)
    requests: list[gen.GenerateRequest] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    remaining: list[float | None] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when a call is over, however it ended."""
    address: str = ""

    def __enter__(self) -> Self:
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(_Generation(self), self._server)  # type: ignore[abstract]
        models_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self), self._server)
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(_Tokenizer(self), self._server)  # type: ignore[abstract]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()


def _abort(context: Any, error: QwireError) -> None:
    context.set_trailing_metadata(error.trailing_metadata())
    context.abort(error.code, error.message)


class _Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def Generate(self, request: gen.GenerateRequest, context: Any) -> Iterator[gen.GenerateResponse]:
        fake = self._fake
        over = threading.Event()
        if not context.add_callback(over.set):
            over.set()
        context.add_callback(fake.ended.set)
        fake.requests.append(request)
        fake.metadata.append(dict(context.invocation_metadata()))
        fake.remaining.append(context.time_remaining())
        for step in fake.scripts.pop(0) if fake.scripts else fake.script:
            if isinstance(step, QwireError):
                _abort(context, step)
            elif isinstance(step, Hang):
                over.wait(30)
                return
            else:
                yield step


class _Models(models_pb2_grpc.ModelServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake
        self._model = models_pb2.ModelInfo(
            name="demo", architecture="LlamaForCausalLM", context_length=2048, dtype="float32", quantization="none"
        )

    def ListModels(self, request: models_pb2.ListModelsRequest, context: Any) -> models_pb2.ListModelsResponse:
        return models_pb2.ListModelsResponse(models=[self._model])

    def GetModel(self, request: models_pb2.GetModelRequest, context: Any) -> models_pb2.GetModelResponse:
        if request.model not in ("", "demo"):
            _abort(context, QwireError(grpc.StatusCode.NOT_FOUND, "no such model", reason="MODEL_NOT_FOUND"))
        return models_pb2.GetModelResponse(model=self._model)


class _Tokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """One id a byte."""

    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def Encode(self, request: tok.EncodeRequest, context: Any) -> tok.EncodeResponse:
        self._fake.others.append(request)
        return tok.EncodeResponse(encodings=[tok.TokenIds(ids=text.encode()) for text in request.texts])

    def Decode(self, request: tok.DecodeRequest, context: Any) -> tok.DecodeResponse:
        self._fake.others.append(request)
        return tok.DecodeResponse(texts=[bytes(item.ids).decode() for item in request.sequences])

    def RenderChat(self, request: tok.RenderChatRequest, context: Any) -> tok.RenderChatResponse:
        self._fake.others.append(request)
        return tok.RenderChatResponse(token_ids=[1, 2], text="rendered", template_time=request.template_time)
