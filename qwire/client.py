"""The blocking client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import grpc

from qwire._channel import DEFAULT_ADDRESS, channel_options
from qwire._chat import MessageLike, ToolLike
from qwire._request import (
    GenerateOptions,
    decode_request,
    encode_request,
    generate_request,
    render_chat_request,
)
from qwire._stream import GenerationView
from qwire.errors import QwireError
from qwire.v1 import generation_pb2 as gen
from qwire.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc, tokenizer_pb2_grpc
from qwire.v1 import tokenizer_pb2 as tok

_Answer = TypeVar("_Answer")


class _Stream(Protocol):
    def __next__(self) -> gen.GenerateResponse: ...

    def cancel(self) -> bool: ...


class Generation(GenerationView):
    """One running request. Iterate it for deltas; what they add up to is in `text`, `token_ids` and `choices`.

    Used as a context manager it cancels the request when the block is left early. Iterating raises `QwireError` when
    the call fails, when it was cancelled, and (INTERNAL) when a delta doesn't continue what came before.
    """

    def __init__(self, request: gen.GenerateRequest, start: Callable[[gen.GenerateRequest], _Stream]) -> None:
        super().__init__(request)
        self._ended = False
        try:
            self._call = start(request)
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
        self._call.cancel()

    def _next(self) -> gen.GenerateResponse:
        if self._ended:
            raise StopIteration
        try:
            response = next(self._call)
            self._transcript.add(response)
        except StopIteration:
            self._ended = True
            self._transcript.end()
            raise
        except grpc.RpcError as error:
            self._ended = True
            raise QwireError.from_rpc(error) from error
        except QwireError:
            self._ended = True
            self.cancel()
            raise
        return response

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """A connection to a router.

    Connects when first used, and again after the connection was lost. Safe to use from several threads.

    Args:
        address: a gRPC target: "host:port", "unix:/path", "dns:///name:port".
        credentials: TLS; None means plain text.
        metadata: sent with every call; keys in lower case.
        options: more gRPC channel arguments.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        options: Sequence[tuple[str, int | str]] = (),
    ) -> None:
        arguments = channel_options(address, options)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=arguments)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=arguments)
        self._metadata = tuple(metadata)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = models_pb2_grpc.ModelServiceStub(self._channel)
        self._tokenizer = tokenizer_pb2_grpc.TokenizerServiceStub(self._channel)

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
        return Generation(
            request, lambda message: self._generation.Generate(message, timeout=timeout, metadata=self._metadata)
        )

    def generate_once(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> gen.GenerateOnceResponse:
        """Generates and returns everything when it is done: `choices[0].text`. Arguments are those of `generate`."""
        request = gen.GenerateOnceRequest(request=generate_request(prompt, options))
        return _answer(lambda: self._generation.GenerateOnce(request, timeout=timeout, metadata=self._metadata))

    def models(self, *, timeout: float | None = None) -> list[models_pb2.ModelInfo]:
        """All served models, in order of name."""
        request = models_pb2.ListModelsRequest()
        answer = _answer(lambda: self._models.ListModels(request, timeout=timeout, metadata=self._metadata))
        return list(answer.models)

    def model(self, name: str = "", *, timeout: float | None = None) -> models_pb2.ModelInfo:
        """One served model; the name may be empty where there is but one. NOT_FOUND if it isn't served."""
        request = models_pb2.GetModelRequest(model=name)
        return _answer(lambda: self._models.GetModel(request, timeout=timeout, metadata=self._metadata)).model

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
        answer = _answer(lambda: self._tokenizer.Encode(request, timeout=timeout, metadata=self._metadata))
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
        answer = _answer(lambda: self._tokenizer.Decode(request, timeout=timeout, metadata=self._metadata))
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
        return _answer(lambda: self._tokenizer.RenderChat(request, timeout=timeout, metadata=self._metadata))

    def close(self) -> None:
        """Closes the connection; running requests are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answer(call: Callable[[], _Answer]) -> _Answer:
    try:
        return call()
    except grpc.RpcError as error:
        raise QwireError.from_rpc(error) from error
