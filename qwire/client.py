"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import grpc

from qwire._channel import DEFAULT_ADDRESS, address_list, router_options
from qwire._chat import MessageLike, ToolLike
from qwire._request import (
    GenerateOptions,
    decode_request,
    encode_request,
    generate_request,
    render_chat_request,
)
from qwire._stream import GenerationView, cancelled
from qwire._tries import Tries, Turns
from qwire.errors import QwireError
from qwire.v1 import generation_pb2 as gen
from qwire.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc, tokenizer_pb2_grpc
from qwire.v1 import tokenizer_pb2 as tok

_Request = TypeVar("_Request", contravariant=True)
_Answer = TypeVar("_Answer", covariant=True)


class _Stream(Protocol):
    def __next__(self) -> gen.GenerateResponse: ...

    def cancel(self) -> bool: ...


class _Method(Protocol[_Request, _Answer]):
    def __call__(
        self, request: _Request, /, *, timeout: float | None, metadata: tuple[tuple[str, str | bytes], ...]
    ) -> _Answer: ...


class Generation(GenerationView):
    """One running request. Iterate it for deltas; what they add up to is in `text`, `token_ids` and `choices`.

    When its router is lost it goes on at that one or another, and whoever iterates sees a pause. Used as a context
    manager it cancels the request when the block is left early. Iterating raises `QwireError` when the call fails, when
    it was cancelled, and (INTERNAL) when a delta doesn't continue what came before.
    """

    def __init__(
        self, request: gen.GenerateRequest, start: Callable[[gen.GenerateRequest, Tries], _Stream], tries: Tries
    ) -> None:
        super().__init__(request, tries)
        self._ended = False
        self._cancelled = threading.Event()
        self._start = start
        try:
            self._call = start(request, tries)
        except grpc.RpcError as error:
            raise QwireError.from_rpc(error) from error

    def __iter__(self) -> Iterator[gen.Delta]:
        return self

    def __next__(self) -> gen.Delta:
        while True:
            response = self._next()
            if response.WhichOneof("event") == "delta":
                return response.delta

    def responses(self) -> Iterator[gen.GenerateResponse]:
        """The stream's messages as they are, `Accepted` and `Finished` among them, from here on."""
        while True:
            try:
                response = self._next()
            except StopIteration:
                return
            yield response

    def start(self) -> gen.Accepted:
        """Waits until a worker has taken the request.

        Raises:
            QwireError: it was refused; nothing was computed, and trying again is safe.
        """
        while self.accepted is None:
            try:
                self._next()
            except StopIteration:
                break
        if self.accepted is None:
            raise QwireError(grpc.StatusCode.INTERNAL, "the stream ended before it began")
        return self.accepted

    def read(self) -> Self:
        """Waits for the end; returns itself."""
        for _ in self:
            pass
        return self

    def cancel(self) -> None:
        """Ends the request; safe to call from any thread and at any time. Whoever iterates gets CANCELLED."""
        self._cancelled.set()
        self._call.cancel()

    def _next(self) -> gen.GenerateResponse:
        if self._ended:
            raise StopIteration
        try:
            while (response := self._receive()) is None:
                pass
        except BaseException:
            self._ended = True
            raise
        return response

    def _receive(self) -> gen.GenerateResponse | None:
        """The next message that says something new; None where there may be one now."""
        try:
            response = next(self._call)
        except StopIteration:
            self._transcript.end()
            raise
        except grpc.RpcError as error:
            self._go_on(QwireError.from_rpc(error), error)
            return None
        try:
            new = self._transcript.add(response)
        except QwireError:
            self._call.cancel()
            raise
        if new:
            self._tries.progressed()
        return response if new else None

    def _go_on(self, error: QwireError, cause: grpc.RpcError) -> None:
        """Starts the call that goes on with one that failed. Raises the error where there is none."""
        if self._transcript.complete and not self._cancelled.is_set():
            raise StopIteration  # all that was missing is the status
        delay = None if self._cancelled.is_set() else self._delay(error)
        if delay is None:
            raise error from cause
        if self._cancelled.wait(delay):
            raise cancelled() from cause
        self._call = self._start(self._transcript.resume(), self._tries)
        if self._cancelled.is_set():
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class _Router:
    """The way to one router."""

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, int | str]],
        *,
        alone: bool,
    ) -> None:
        arguments = router_options(address, options, retries=alone)
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options=arguments)
        else:
            self.channel = grpc.secure_channel(address, credentials, options=arguments)
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.models = models_pb2_grpc.ModelServiceStub(self.channel)
        self.tokenizer = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)


class Client:
    """Connections to the routers of a fleet, or to one.

    Connects when first used, and again after a connection was lost. Calls take turns over the routers; one that finds
    its router gone goes to the next, and a stream goes on there. Safe to use from several threads.

    Args:
        address: a gRPC target: "host:port", "unix:/path", "dns:///name:port"; or one for each router.
        credentials: TLS; None means plain text.
        metadata: sent with every call; keys in lower case.
        options: more gRPC channel arguments.
    """

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        options: Sequence[tuple[str, int | str]] = (),
    ) -> None:
        targets = address_list(address)
        self._routers = [_Router(target, credentials, options, alone=len(targets) == 1) for target in targets]
        self._turns = Turns(len(self._routers))
        self._metadata = tuple(metadata)

    def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Starts a request.

        Args:
            prompt: the whole prompt as text, in which special-token markers count; `chat` or `messages` for a
                conversation.
            timeout: seconds until the request is given up on (DEADLINE_EXCEEDED); None means no limit.
            options: see `GenerateOptions`.

        Raises:
            TypeError, ValueError: the arguments make no request. What the server refuses is raised when iterating.
        """
        return self.generate_request(generate_request(prompt, options), timeout=timeout)

    def generate_request(self, request: gen.GenerateRequest, *, timeout: float | None = None) -> Generation:
        """Starts a request that the caller has built; everything that the contract has can be said this way."""

        def start(message: gen.GenerateRequest, tries: Tries) -> _Stream:
            stub = self._routers[tries.router].generation
            return stub.Generate(message, timeout=tries.timeout, metadata=self._metadata)

        return Generation(request, start, self._turns.call(timeout))

    def generate_once(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> gen.GenerateOnceResponse:
        """Generates and returns everything when it is done: `choices[0].text`. Arguments are those of `generate`."""
        request = gen.GenerateOnceRequest(request=generate_request(prompt, options))
        return self._ask(lambda router: router.generation.GenerateOnce, request, timeout)

    def models(self, *, timeout: float | None = None) -> list[models_pb2.ModelInfo]:
        """All served models, in order of name."""
        request = models_pb2.ListModelsRequest()
        answer = self._ask(lambda router: router.models.ListModels, request, timeout)
        return list(answer.models)

    def model(self, name: str = "", *, timeout: float | None = None) -> models_pb2.ModelInfo:
        """One served model; the name may be empty where there is but one. NOT_FOUND if it isn't served."""
        request = models_pb2.GetModelRequest(model=name)
        return self._ask(lambda router: router.models.GetModel, request, timeout).model

    def encode(
        self,
        text: str,
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        special_tokens_as_text: bool | None = None,
        timeout: float | None = None,
    ) -> list[int]:
        """The token ids of a text."""
        (ids,) = self.encode_batch(
            [text],
            model=model,
            add_special_tokens=add_special_tokens,
            special_tokens_as_text=special_tokens_as_text,
            timeout=timeout,
        )
        return ids

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        special_tokens_as_text: bool | None = None,
        timeout: float | None = None,
    ) -> list[list[int]]:
        """The token ids of each text."""
        request = encode_request(texts, model, add_special_tokens, special_tokens_as_text)
        answer = self._ask(lambda router: router.tokenizer.Encode, request, timeout)
        return [list(item.ids) for item in answer.encodings]

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        (text,) = self.decode_batch([token_ids], model=model, skip_special_tokens=skip_special_tokens, timeout=timeout)
        return text

    def decode_batch(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> list[str]:
        """The text of each list of token ids."""
        request = decode_request(sequences, model, skip_special_tokens)
        answer = self._ask(lambda router: router.tokenizer.Decode, request, timeout)
        return list(answer.texts)

    def render_chat(
        self,
        messages: Sequence[MessageLike],
        *,
        model: str = "",
        tools: Sequence[ToolLike] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool | None = None,
        template_time: int | None = None,
        timeout: float | None = None,
    ) -> tok.RenderChatResponse:
        """The prompt that the model's chat template makes of a conversation, as ids and as text."""
        request = render_chat_request(
            messages,
            model=model,
            tools=tools,
            enable_thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt,
            template_time=template_time,
        )
        return self._ask(lambda router: router.tokenizer.RenderChat, request, timeout)

    def close(self) -> None:
        """Closes the connections; running requests are cancelled."""
        for router in self._routers:
            router.channel.close()

    def _ask(
        self, method: Callable[[_Router], _Method[_Request, _Answer]], request: _Request, timeout: float | None
    ) -> _Answer:
        """A call that answers once, at the next router where one is gone."""
        tries = self._turns.call(timeout)
        while True:
            try:
                call = method(self._routers[tries.router])
                return call(request, timeout=tries.timeout, metadata=self._metadata)
            except grpc.RpcError as error:
                failed = QwireError.from_rpc(error)
                delay = tries.after(failed)
                if delay is None:
                    raise failed from error
                time.sleep(delay)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
