"""The router's smaller services: models, the tokenizer for clients, and administration."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc

from qwire.errors import QwireError, Reason
from qwire.service.status import not_in_this_release
from qwire.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from router.admission import Admission
from router.config import RouterConfig
from router.fleet import Fleet
from router.tokenizer_link import TokenizerLink, relay
from router.validation import Violations, check_chat

Context = grpc.aio.ServicerContext[Any, Any]


class ModelServicer(models_pb2_grpc.ModelServiceServicer):
    """ModelService over what the workers said of themselves."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def ListModels(
        self, request: models_pb2.ListModelsRequest, context: Context
    ) -> models_pb2.ListModelsResponse:
        return models_pb2.ListModelsResponse(models=self._fleet.models())

    async def GetModel(self, request: models_pb2.GetModelRequest, context: Context) -> models_pb2.GetModelResponse:
        return models_pb2.GetModelResponse(model=await self._fleet.find_model(request.model))


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """TokenizerService for clients: passed on to the tokenizer service, which checks what it is asked."""

    def __init__(self, config: RouterConfig, tokenizer: TokenizerLink) -> None:
        self._config = config
        self._tokenizer = tokenizer

    async def Encode(self, request: tokenizer_pb2.EncodeRequest, context: Context) -> tokenizer_pb2.EncodeResponse:
        return await relay(self._tokenizer.stub.Encode(request, timeout=context.time_remaining()))

    async def Decode(self, request: tokenizer_pb2.DecodeRequest, context: Context) -> tokenizer_pb2.DecodeResponse:
        return await relay(self._tokenizer.stub.Decode(request, timeout=context.time_remaining()))

    async def RenderChat(
        self, request: tokenizer_pb2.RenderChatRequest, context: Context
    ) -> tokenizer_pb2.RenderChatResponse:
        found = Violations()
        check_chat(request.chat, self._config, found)
        found.raise_if_any()
        return await relay(self._tokenizer.stub.RenderChat(request, timeout=context.time_remaining()))

    def Detokenize(
        self, request_iterator: AsyncIterator[tokenizer_pb2.DetokenizeRequest], context: Context
    ) -> AsyncIterator[tokenizer_pb2.DetokenizeResponse]:
        raise QwireError(
            grpc.StatusCode.UNIMPLEMENTED,
            "Detokenize is between router and tokenizer service; Decode turns ids into text",
            reason=Reason.NOT_IN_THIS_RELEASE,
        )

    async def GetTokenizer(
        self, request: tokenizer_pb2.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[tokenizer_pb2.GetTokenizerResponse]:
        stream = aiter(self._tokenizer.stub.GetTokenizer(request, timeout=context.time_remaining()))
        while (message := await relay(anext(stream, None))) is not None:
            yield message


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """AdminService: what this router sees."""

    def __init__(self, fleet: Fleet, admission: Admission, active_streams: Callable[[], int]) -> None:
        self._fleet = fleet
        self._admission = admission
        self._active_streams = active_streams

    async def ListWorkers(
        self, request: admin_pb2.ListWorkersRequest, context: Context
    ) -> admin_pb2.ListWorkersResponse:
        return admin_pb2.ListWorkersResponse(
            workers=[
                admin_pb2.WorkerStatus(
                    target=link.target,
                    ready=link.ready,
                    info=link.info,
                    load=link.load,
                    streams=link.streams,
                    kept_out=link.kept_out,
                )
                for link in sorted(self._fleet.links, key=lambda link: link.target)
            ]
        )

    async def GetState(self, request: admin_pb2.GetStateRequest, context: Context) -> admin_pb2.GetStateResponse:
        links = [link for link in self._fleet.links if link.ready]
        return admin_pb2.GetStateResponse(
            active_streams=self._active_streams(),
            blocks_in_use=sum(link.load.blocks_in_use for link in links),
            blocks_cached=sum(link.load.blocks_cached for link in links),
            blocks_total=sum(link.info.num_blocks for link in links if link.info is not None),
            requests_running=sum(link.load.running for link in links),
            requests_waiting=sum(link.load.waiting for link in links),
            preemptions=sum(link.load.preemptions for link in links),
            drafted_tokens=sum(link.load.drafted_tokens for link in links),
            accepted_tokens=sum(link.load.accepted_tokens for link in links),
            prompt_tokens=sum(link.load.prompt_tokens for link in links),
            cached_tokens=sum(link.load.cached_tokens for link in links),
            evictions=sum(link.load.evictions for link in links),
            workers_kept_out=sum(bool(link.kept_out) for link in self._fleet.links),
            requests_queued=self._admission.queued,
            queued_tokens=self._admission.queued_tokens,
            requests_refused=self._admission.refused,
        )

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> NoReturn:
        raise not_in_this_release("Drain")

    async def FlushPrefixCache(self, request: admin_pb2.FlushPrefixCacheRequest, context: Context) -> NoReturn:
        raise not_in_this_release("FlushPrefixCache")
