"""The asyncio client: `qwire.client` once more, with the same names and the same meaning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack, cast

import grpc

from qwire._channel import DEFAULT_ADDRESS, address_list, router_options
from qwire._chat import MessageLike, ToolLike
from qwire._request import GenerateOptions, decode_request, encode_request, generate_request, render_chat_request
from qwire._stream import GenerationView, cancelled
from qwire._tries import Tries, Turns
from qwire.errors import QwireError
from qwire.v1 import generation_pb2 as gen
from qwire.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc, tokenizer_pb2_grpc
from qwire.v1 import tokenizer_pb2 as tok

_Request = TypeVar("_Request", contravariant=True)
_Answer = TypeVar("_Answer", covariant=True)


class _Stream(Protocol):
    async def read(self) -> object: ...

    def cancel(self) -> bool: ...


class _Method(Protocol[_Request, _Answer]):
    def __call__(
        self, request: _Request, /, *, timeout: float | None, metadata: tuple[tuple[str, str | bytes], ...]
    ) -> Awaitable[_Answer]: ...


class AsyncGeneration(GenerationView):
    """One running request. Iterate it for deltas; what they add up to is in `text`, `token_ids` and `choices`.

    When its router is lost it goes on at that one or another, and whoever iterates sees a pause. Used as a context
    manager it cancels the request when the block is left early. Iterating raises `QwireError` when the call fails, when
    `cancel` was called, and (INTERNAL) when a delta doesn't continue what came before. Cancelling the task that
    iterates cancels the request too.
    """

    def __init__(
        self, request: gen.GenerateRequest, start: Callable[[gen.GenerateRequest, Tries], _Stream], tries: Tries
    ) -> None:
        super().__init__(request, tries)
        self._ended = False
        self._cancelled = asyncio.Event()
        self._start = start
        self._call = start(request, tries)

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
        self._cancelled.set()
        self._call.cancel()

    async def _next(self) -> gen.GenerateResponse | None:
        """The next message that says something new; None at the end."""
        try:
            while not self._ended:
                try:
                    response = await self._call.read()
                except grpc.RpcError as error:
                    await self._go_on(QwireError.from_rpc(error), error)
                    continue
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    # grpc raises this for a call cancelled by `cancel` as well, where the task itself is to live on.
                    if not self._cancelled.is_set() or (task is not None and task.cancelling()):
                        # grpc does so too, but for a task that is cancelled as its request has just been sent.
                        self._call.cancel()
                        raise
                    raise cancelled() from None
                if response is grpc.aio.EOF:
                    self._ended = True
                    self._transcript.end()
                elif self._take(cast(gen.GenerateResponse, response)):
                    return cast(gen.GenerateResponse, response)
        except BaseException:
            self._ended = True
            raise
        return None

    def _take(self, message: gen.GenerateResponse) -> bool:
        try:
            new = self._transcript.add(message)
        except QwireError:
            self._call.cancel()
            raise
        if new:
            self._tries.progressed()
        return new

    async def _go_on(self, error: QwireError, cause: grpc.RpcError) -> None:
        """Starts the call that goes on with one that failed. Raises the error where there is none."""
        if self._cancelled.is_set():
            raise error from cause
        if self._transcript.complete:
            self._ended = True  # all that was missing is the status
            return
        delay = self._delay(error)
        if delay is None:
            raise error from cause
        try:
            await asyncio.wait_for(self._cancelled.wait(), delay)
        except TimeoutError:
            self._call = self._start(self._transcript.resume(), self._tries)
        else:
            raise cancelled() from cause

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
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
            self.channel = grpc.aio.insecure_channel(address, options=arguments)
        else:
            self.channel = grpc.aio.secure_channel(address, credentials, options=arguments)
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.models = models_pb2_grpc.ModelServiceStub(self.channel)
        self.tokenizer = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)


class AsyncClient:
    """Connections to the routers of a fleet, or to one, for one event loop.

    Connects when first used, and again after a connection was lost. Calls take turns over the routers; one that finds
    its router gone goes to the next, and a stream goes on there. To be created in a running event loop.

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

        def start(message: gen.GenerateRequest, tries: Tries) -> _Stream:
            stub = self._routers[tries.router].generation
            return stub.Generate(message, timeout=tries.timeout, metadata=self._metadata)

        return AsyncGeneration(request, start, self._turns.call(timeout))

    async def generate_once(
        self, prompt: str | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> gen.GenerateOnceResponse:
        """Generates and returns everything when it is done: `choices[0].text`. Arguments are those of `generate`."""
        request = gen.GenerateOnceRequest(request=generate_request(prompt, options))
        return await self._ask(lambda router: router.generation.GenerateOnce, request, timeout)

    async def models(self, *, timeout: float | None = None) -> list[models_pb2.ModelInfo]:
        """All served models, in order of name."""
        request = models_pb2.ListModelsRequest()
        answer = await self._ask(lambda router: router.models.ListModels, request, timeout)
        return list(answer.models)

    async def model(self, name: str = "", *, timeout: float | None = None) -> models_pb2.ModelInfo:
        """One served model; the name may be empty where there is but one. NOT_FOUND if it isn't served."""
        request = models_pb2.GetModelRequest(model=name)
        return (await self._ask(lambda router: router.models.GetModel, request, timeout)).model

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
        answer = await self._ask(lambda router: router.tokenizer.Encode, request, timeout)
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
        answer = await self._ask(lambda router: router.tokenizer.Decode, request, timeout)
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
        return await self._ask(lambda router: router.tokenizer.RenderChat, request, timeout)

    async def close(self) -> None:
        """Closes the connections; running requests are cancelled."""
        for router in self._routers:
            await router.channel.close()

    async def _ask(
        self, method: Callable[[_Router], _Method[_Request, _Answer]], request: _Request, timeout: float | None
    ) -> _Answer:
        """A call that answers once, at the next router where one is gone."""
        tries = self._turns.call(timeout)
        while True:
            try:
                call = method(self._routers[tries.router])
                return await call(request, timeout=tries.timeout, metadata=self._metadata)
            except grpc.RpcError as error:
                failed = QwireError.from_rpc(error)
                delay = tries.after(failed)
                if delay is None:
                    raise failed from error
                await asyncio.sleep(delay)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
