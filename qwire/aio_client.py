"""The asyncio client: `qwire.client` once more, with the same names and the same meaning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack, cast

import grpc

from qwire._channel import DEFAULT_ADDRESS, channel_options
from qwire._chat import MessageLike, ToolLike
from qwire._request import GenerateOptions, decode_request, encode_request, generate_request, render_chat_request
from qwire._stream import GenerationView
from qwire.errors import QwireError
from qwire.v1 import generation_pb2 as gen
from qwire.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc, tokenizer_pb2_grpc
from qwire.v1 import tokenizer_pb2 as tok

_Answer = TypeVar("_Answer")


class _Stream(Protocol):
    async def read(self) -> object: ...

    def cancel(self) -> bool: ...


class AsyncGeneration(GenerationView):
    """One running request. Iterate it for deltas; what they add up to is in `text`, `token_ids` and `choices`.

    Used as a context manager it cancels the request when the block is left early. Iterating raises `QwireError` when
    the call fails, when `cancel` was called, and (INTERNAL) when a delta doesn't continue what came before. Cancelling
    the task that iterates cancels the request too.
    """

    def __init__(self, request: gen.GenerateRequest, start: Callable[[gen.GenerateRequest], _Stream]) -> None:
        super().__init__(request)
        self._ended = False
        self._cancelled = False
        self._call = start(request)

    def __aiter__(self) -> AsyncIterator[gen.Delta]:
        return self

    async def __anext__(self) -> gen.Delta:
        while (response := await self._next()) is not None:
            if response.WhichOneof("event") == "delta":
                return response.delta
        raise StopAsyncIteration

    async def responses(self) -> AsyncIterator[gen.GenerateResponse]:
        """The stream's messages as they are, `Accepted` and `Finished` among them, from here on."""
        while (response := await self._next()) is not None:
            yield response

    async def start(self) -> gen.Accepted:
        """Waits until a worker has taken the request.

        Raises:
            QwireError: it was refused; nothing was computed, and trying again is safe.
        """
        while self.accepted is None and await self._next() is not None:
            pass
        if self.accepted is None:
            raise QwireError(grpc.StatusCode.INTERNAL, "the stream ended before it began")
        return self.accepted

    async def read(self) -> Self:
        """Waits for the end; returns itself."""
        async for _ in self:
            pass
        return self

    def cancel(self) -> None:
        """Ends the request. Whoever iterates gets CANCELLED."""
        self._cancelled = True
        self._call.cancel()

    async def _next(self) -> gen.GenerateResponse | None:
        if self._ended:
            return None
        try:
            response = await self._call.read()
        except grpc.RpcError as error:
            self._ended = True
            raise QwireError.from_rpc(error) from error
        except asyncio.CancelledError:
            self._ended = True
            task = asyncio.current_task()
            # grpc raises this for a call cancelled by `cancel` as well, where the task itself is to live on.
            if not self._cancelled or (task is not None and task.cancelling()):
                raise
            raise QwireError(grpc.StatusCode.CANCELLED, "cancelled by the caller") from None
        if response is grpc.aio.EOF:
            self._ended = True
            self._transcript.end()
            return None
        message = cast(gen.GenerateResponse, response)
        try:
            self._transcript.add(message)
        except QwireError:
            self._ended = True
            self.cancel()
            raise
        return message

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient:
    """A connection to a router, for one event loop.

    Connects when first used, and again after the connection was lost. To be created in a running event loop.

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
            self._channel = grpc.aio.insecure_channel(address, options=arguments)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=arguments)
        self._metadata = tuple(metadata)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models = models_pb2_grpc.ModelServiceStub(self._channel)
        self._tokenizer = tokenizer_pb2_grpc.TokenizerServiceStub(self._channel)

    def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGeneration:
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

    def generate_request(self, request: gen.GenerateRequest, *, timeout: float | None = None) -> AsyncGeneration:
        """Starts a request that the caller has built; everything that the contract has can be said this way."""
        return AsyncGeneration(
            request, lambda message: self._generation.Generate(message, timeout=timeout, metadata=self._metadata)
        )

    async def generate_once(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> gen.GenerateOnceResponse:
        """Generates and returns everything when it is done: `choices[0].text`. Arguments are those of `generate`."""
        request = gen.GenerateOnceRequest(request=generate_request(prompt, options))
        return await _answer(self._generation.GenerateOnce(request, timeout=timeout, metadata=self._metadata))

    async def models(self, *, timeout: float | None = None) -> list[models_pb2.ModelInfo]:
        """All served models, in order of name."""
        request = models_pb2.ListModelsRequest()
        answer = await _answer(self._models.ListModels(request, timeout=timeout, metadata=self._metadata))
        return list(answer.models)

    async def model(self, name: str = "", *, timeout: float | None = None) -> models_pb2.ModelInfo:
        """One served model; the name may be empty where there is but one. NOT_FOUND if it isn't served."""
        request = models_pb2.GetModelRequest(model=name)
        return (await _answer(self._models.GetModel(request, timeout=timeout, metadata=self._metadata))).model

    async def encode(
        self,
        text: str,
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        special_tokens_as_text: bool | None = None,
        timeout: float | None = None,
    ) -> list[int]:
        """The token ids of a text."""
        (ids,) = await self.encode_batch(
            [text],
            model=model,
            add_special_tokens=add_special_tokens,
            special_tokens_as_text=special_tokens_as_text,
            timeout=timeout,
        )
        return ids

    async def encode_batch(
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
        answer = await _answer(self._tokenizer.Encode(request, timeout=timeout, metadata=self._metadata))
        return [list(item.ids) for item in answer.encodings]

    async def decode(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids."""
        (text,) = await self.decode_batch(
            [token_ids], model=model, skip_special_tokens=skip_special_tokens, timeout=timeout
        )
        return text

    async def decode_batch(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> list[str]:
        """The text of each list of token ids."""
        request = decode_request(sequences, model, skip_special_tokens)
        answer = await _answer(self._tokenizer.Decode(request, timeout=timeout, metadata=self._metadata))
        return list(answer.texts)

    async def render_chat(
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
        return await _answer(self._tokenizer.RenderChat(request, timeout=timeout, metadata=self._metadata))

    async def close(self) -> None:
        """Closes the connection; running requests are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _answer(call: Awaitable[_Answer]) -> _Answer:
    try:
        return await call
    except grpc.RpcError as error:
        raise QwireError.from_rpc(error) from error
