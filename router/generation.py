"""GenerationService: from a client's request to its stream."""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from qwire.errors import QwireError
from qwire.ordering import MAX_PRIORITY, MIN_PRIORITY, Claim
from qwire.service.accepts import Metadata
from qwire.service.status import not_in_this_release
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import generation_pb2_grpc, models_pb2, resume_pb2, tokenizer_pb2, worker_pb2
from router import resume
from router.admission import Admission, Ticket
from router.choice import OutputSpec
from router.config import RouterConfig
from router.dispatch import Dispatch, Work
from router.fleet import Fleet
from router.flow import Flow, Whole
from router.journal import Journal
from router.live_requests import LiveRequests
from router.tenant import cache_scope, tenant_key, tenant_of
from router.tokenizer_link import TokenizerLink, relay
from router.validation import Violations, check, check_prompt, resolve

Context = grpc.aio.ServicerContext[Any, Any]

PREVIOUS_ATTEMPTS_KEY = "grpc-previous-rpc-attempts"
BYTES_A_TOKEN = 4
"""Of text, about: what a prompt counts before it is tokenized."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt's ids, four bytes each, and what the template's clock showed if one made them."""

    ids: array[int]
    template_time: int | None = None


SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
QUEUED_METHODS = (f"/{SERVICE}/Generate", f"/{SERVICE}/GenerateOnce")


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Serves streams. One handler a stream holds everything that the stream owns, and gives it back however it ends."""

    def __init__(self, config: RouterConfig, fleet: Fleet, admission: Admission, tokenizer: TokenizerLink) -> None:
        self._config = config
        self._fleet = fleet
        self._admission = admission
        self._tokenizer = tokenizer
        self.flow = Flow()
        self._next_sequence = 1
        self._live = LiveRequests(config.max_streams)

    @property
    def active_streams(self) -> int:
        return len(self._live)

    def refuse(self, metadata: Metadata) -> QwireError | None:
        """What a call of `QUEUED_METHODS` is refused with while its request is unread; None where that is left to
        `_enter`. Under overload most calls end here: with more than one model, what waits for which isn't known yet."""
        if not (model := self._fleet.known_model("")):
            return None
        try:
            return self._admission.refuse(tenant_of(metadata), model)
        except QwireError:  # of the metadata
            return None

    def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        return self._stream(request, context, self._enter(request, context))

    async def GenerateOnce(self, request: pb.GenerateOnceRequest, context: Context) -> pb.GenerateOnceResponse:
        if request.request.HasField("resume"):
            found = Violations()
            found.add("request.resume", "goes on with a stream; a call that answers once is sent again whole")
            found.raise_if_any()
        ticket = self._enter(request.request, context)
        answer = pb.GenerateOnceResponse()
        try:
            async with aclosing(self._stream(request.request, context, ticket, answer)) as messages:
                async for message in messages:
                    _collect(answer, message)
        except QwireError as error:
            raise error.under("request") from None
        return answer

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> NoReturn:
        raise not_in_this_release("Embed")

    async def Score(self, request: pb.ScoreRequest, context: Context) -> NoReturn:
        raise not_in_this_release("Score")

    def _enter(self, request: pb.GenerateRequest, context: Context) -> Ticket:
        """A request's place, before anything is computed for it. Raises QwireError."""
        arrival, remaining = time.monotonic(), context.time_remaining()
        tenant = tenant_of(context.invocation_metadata())
        claim = Claim(
            tenant=tenant_key(self._config.fleet_secret, tenant),
            priority=min(max(request.priority, MIN_PRIORITY), MAX_PRIORITY),
            deadline=math.inf if remaining is None else arrival + remaining,
            arrival=arrival,
        )
        model = self._fleet.known_model(request.model)
        return self._admission.enter(tenant, claim, _guess_tokens(request), model)

    async def _stream(
        self,
        request: pb.GenerateRequest,
        context: Context,
        ticket: Ticket,
        answer: pb.GenerateOnceResponse | None = None,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """A stream's messages, which must be asked for: the ticket is given back at their end. `answer` is given what
        isn't in any of them, where the stream becomes one."""
        tenant = ticket.tenant
        with ticket:
            check(request, self._config, once=answer is not None)
            resumed = None
            if request.HasField("resume"):
                resumed = resume.read(self._config.fleet_secret, request.resume.token)
                request = resume.filled(request, resumed)
            request_id = request.request_id if request.HasField("request_id") else None
            again = resumed is not None or _was_sent_before(context)
            async with self._live.admit(tenant, request_id, again=again) as live:
                model = await self._fleet.find_model(request.model)
                prompt = await self._prompt(request, resumed)
                ticket.count(len(prompt.ids))
                check_prompt(request, prompt.ids, model, self._config)
                sampling, stop = resolve(request, len(prompt.ids), model, self._config, tenant)
                parameters = resume.digest(sampling, stop, request.output, request.constraint, model.eos_token_ids)
                if resumed is not None:
                    resume.check_same(resumed, prompt.ids, parameters)
                    resume.check_choices(request.resume.choices, sampling, stop, model.vocab_size)
                spec = OutputSpec(
                    stop=stop,
                    want_text=not request.output.HasField("text") or request.output.text,
                    want_ids=not request.output.HasField("token_ids") or request.output.token_ids,
                    # An answer in one piece waits here until it is whole.
                    max_pending_tokens=self._config.max_pending_tokens if answer is None else stop.max_tokens,
                )
                turns = self.flow.valve if answer is None else Whole
                sequences = self._name_sequences(sampling.n)
                journal = Journal(spec, sequences, len(prompt.ids), ticket.claim.arrival, time.monotonic, turns)
                live.attach(journal)
                params = resolved_params(sampling, stop, request.output, await self._bad_words(request), model)
                if resumed is not None:
                    held = request.resume.choices
                    journal.resume(held, [resume.end_of(choice.token_ids, params) for choice in held])
                work = self._work(request, ticket, model.name, prompt, params, resumed)
                live.check()
                dispatch = Dispatch(work, journal, self._fleet, self._config.max_moves, ticket)
                async with self._running(journal, dispatch, ticket, detokenized=spec.detokenized):
                    if journal.needs_worker:
                        await journal.admitted
                    accepted = pb.Accepted(
                        request_id=live.request_id,
                        sampling=sampling,
                        stop=stop,
                        prompt_tokens=len(prompt.ids),
                        numerics_id=dispatch.numerics_id,
                        resume_token=resume.issue(
                            self._config.fleet_secret,
                            numerics_id=dispatch.numerics_id,
                            prompt_ids=prompt.ids,
                            parameters=parameters,
                            sampling=sampling,
                            max_tokens=stop.max_tokens,
                            template_time=prompt.template_time,
                        ),
                    )
                    yield pb.GenerateResponse(accepted=accepted)
                    while not journal.finished:
                        for message in await journal.next_messages():
                            yield message
                    if answer is not None:
                        answer.prompt_logprobs.extend(journal.prompt_logprobs)

    def _work(
        self,
        request: pb.GenerateRequest,
        ticket: Ticket,
        model: str,
        prompt: _Prompt,
        params: worker_pb2.ResolvedParams,
        resumed: resume_pb2.ResumeState | None,
    ) -> Work:
        """What workers are asked for."""
        claim, output = ticket.claim, request.output
        return Work(
            model=model,
            prompt_ids=prompt.ids,
            params=params,
            scope=cache_scope(self._config.fleet_secret, ticket.tenant, request.prefix_cache.scope),
            bypass=request.prefix_cache.bypass,
            best_effort=request.continuity == pb.CONTINUITY_BEST_EFFORT,
            tenant=claim.tenant,
            priority=claim.priority,
            arrival=claim.arrival,
            deadline=claim.deadline,
            numerics_id=resumed.numerics_id if resumed is not None else "",
            constraint=request.constraint if request.HasField("constraint") else None,
            prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
        )

    @asynccontextmanager
    async def _running(
        self, journal: Journal, dispatch: Dispatch, ticket: Ticket, *, detokenized: bool
    ) -> AsyncIterator[None]:
        """Runs a request, and gives back all that it holds at worker and tokenizer when the stream ends."""
        if detokenized:
            self._tokenizer.open(journal)
        running = asyncio.create_task(dispatch.run())
        try:
            yield
        finally:
            running.cancel()
            dispatch.release()
            self._tokenizer.release(journal)
            journal.close()
            ticket.charge(journal.generated_tokens)

    async def _prompt(self, request: pb.GenerateRequest, resumed: resume_pb2.ResumeState | None) -> _Prompt:
        match request.WhichOneof("input"):
            case "token_ids":
                return _Prompt(array("I", request.token_ids.ids))
            case "text":
                encode = tokenizer_pb2.EncodeRequest(model=request.model, texts=[request.text])
                encoded = await relay(self._tokenizer.stub.Encode(encode))
                return _Prompt(array("I", encoded.encodings[0].ids))
            case _:
                render = tokenizer_pb2.RenderChatRequest(model=request.model, chat=request.chat)
                if resumed is not None and resumed.HasField("template_time"):
                    render.template_time = resumed.template_time
                rendered = await relay(self._tokenizer.stub.RenderChat(render))
                return _Prompt(array("I", rendered.token_ids), rendered.template_time)

    async def _bad_words(self, request: pb.GenerateRequest) -> list[list[int]]:
        """The ids of each bad word, as a word by itself and behind a space."""
        texts = [text for word in request.sampling.bad_words for text in (word, f" {word}")]
        if not texts:
            return []
        encode = tokenizer_pb2.EncodeRequest(
            model=request.model, texts=texts, add_special_tokens=False, special_tokens_as_text=True
        )
        encoded = await relay(self._tokenizer.stub.Encode(encode))
        distinct = dict.fromkeys(tuple(encoding.ids) for encoding in encoded.encodings)
        return [list(ids) for ids in distinct if ids]

    def _name_sequences(self, count: int) -> range:
        first = self._next_sequence
        self._next_sequence += count
        return range(first, self._next_sequence)


def _guess_tokens(request: pb.GenerateRequest) -> int:
    """Of a request's prompt, by its bytes, in no time."""
    if request.WhichOneof("input") == "token_ids":
        return max(1, len(request.token_ids.ids))
    return max(1, request.ByteSize() // BYTES_A_TOKEN)


def _was_sent_before(context: Context) -> bool:
    """Whether gRPC's own retries sent this call: a client that repeats one by itself doesn't name earlier attempts."""
    return any(key == PREVIOUS_ATTEMPTS_KEY for key, _ in context.invocation_metadata() or ())


def resolved_params(
    sampling: pb.SamplingParams,
    stop: pb.StopOptions,
    output: pb.OutputOptions,
    bad_words: list[list[int]],
    model: models_pb2.ModelInfo,
) -> worker_pb2.ResolvedParams:
    """What a worker is told of how to draw and when to end."""
    return worker_pb2.ResolvedParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=sampling.logit_bias,
        allowed_token_ids=sampling.allowed_token_ids,
        bad_words=[tokenizer_pb2.TokenIds(ids=ids) for ids in bad_words],
        max_tokens=stop.max_tokens,
        min_tokens=stop.min_tokens,
        stop_token_ids=stop.token_ids,
        eos_token_ids=() if stop.ignore_eos else model.eos_token_ids,
        logprobs=output.logprobs if output.HasField("logprobs") else None,
    )


def _collect(answer: pb.GenerateOnceResponse, message: pb.GenerateResponse) -> None:
    """Adds a stream's message to the answer that it becomes."""
    match message.WhichOneof("event"):
        case "accepted":
            answer.accepted.CopyFrom(message.accepted)
            answer.choices.extend(pb.GeneratedChoice() for _ in range(message.accepted.sampling.n))
        case "delta":
            choice = answer.choices[message.delta.choice]
            choice.token_ids.extend(message.delta.token_ids)
            choice.logprobs.extend(message.delta.logprobs)
            choice.text += message.delta.text
        case "finished":
            answer.choices[message.finished.choice].finished.CopyFrom(message.finished)
