"""TokenizerService over the codec, the chat renderer and the detokenizer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from qwire.errors import FieldViolation, QwireError, Reason
from qwire.v1 import tokenizer_pb2 as pb
from qwire.v1 import tokenizer_pb2_grpc
from tokenizer_svc.chat import ChatRenderer
from tokenizer_svc.codec import Codec
from tokenizer_svc.config import TokenizerConfig
from tokenizer_svc.detokenizer import Detokenizer, DetokenizerState
from tokenizer_svc.errors import ChatError, ChatFailure, StopOptionsError, TextError, TokenIdError
from tokenizer_svc.markers import encode_segments
from tokenizer_svc.stop_strings import StopOptions

Context = grpc.aio.ServicerContext[Any, Any]

FILE_CHUNK_BYTES = 64 * 1024
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}


class TokenizerFace(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """One model's tokenizer. Encoding and decoding run in threads, off the event loop: the Rust library lets go of
    the interpreter's lock. Detokenizing a step's ids takes microseconds and stays on the loop, in order."""

    def __init__(self, config: TokenizerConfig, codec: Codec, chats: ChatRenderer) -> None:
        self._config = config
        self._codec = codec
        self._chats = chats
        self._detokenizer = Detokenizer(codec)
        self._threads = ThreadPoolExecutor(config.threads, thread_name_prefix="codec")

    async def Encode(self, request: pb.EncodeRequest, context: Context) -> pb.EncodeResponse:
        self._check_model(request.model)
        self._check_count("texts", len(request.texts))

        def encode() -> list[list[int]]:
            return self._codec.encode_batch(
                list(request.texts),
                add_special_tokens=not request.HasField("add_special_tokens") or request.add_special_tokens,
                special_tokens_as_text=request.special_tokens_as_text,
            )

        try:
            encodings = await asyncio.get_running_loop().run_in_executor(self._threads, encode)
        except TextError as error:
            raise invalid("texts", str(error)) from None
        return pb.EncodeResponse(encodings=[pb.TokenIds(ids=ids) for ids in encodings])

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> pb.DecodeResponse:
        self._check_model(request.model)
        self._check_count("sequences", len(request.sequences))
        sequences = [list(sequence.ids) for sequence in request.sequences]
        for number, ids in enumerate(sequences):
            try:
                self._codec.check_ids(ids)
            except TokenIdError as error:
                field = f"sequences[{number}].ids[{error.index}]"
                raise invalid(field, f"must be below {error.vocab_size}, not {error.value}") from None
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens

        def decode() -> list[str]:
            return self._codec.decode_batch(sequences, skip_special_tokens=skip)

        return pb.DecodeResponse(texts=await asyncio.get_running_loop().run_in_executor(self._threads, decode))

    async def RenderChat(self, request: pb.RenderChatRequest, context: Context) -> pb.RenderChatResponse:
        self._check_model(request.model)
        now = request.template_time if request.HasField("template_time") else int(time.time())
        options = request.chat.template_options
        try:
            segments = await self._chats.render(
                [message_as_json(message, index) for index, message in enumerate(request.chat.messages)],
                tools=[tool_as_json(tool, index) for index, tool in enumerate(request.chat.tools)] or None,
                enable_thinking=options.enable_thinking if options.HasField("enable_thinking") else None,
                add_generation_prompt=not options.HasField("add_generation_prompt") or options.add_generation_prompt,
                extra=json_object(options.arguments_json, "chat.template_options.arguments_json"),
                time=now,
            )
        except ChatError as error:
            raise _chat_error(error) from None
        ids = await asyncio.get_running_loop().run_in_executor(self._threads, encode_segments, self._codec, segments)
        return pb.RenderChatResponse(
            token_ids=ids, text="".join(segment.text for segment in segments), template_time=now
        )

    async def Detokenize(
        self, request_iterator: AsyncIterator[pb.DetokenizeRequest], context: Context
    ) -> AsyncIterator[pb.DetokenizeResponse]:
        sequences = OpenSequences(self._detokenizer, self._config.max_open_sequences)
        async for request in request_iterator:
            pieces = list(sequences.answer(request))
            if pieces:
                yield pb.DetokenizeResponse(pieces=pieces)

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[pb.GetTokenizerResponse]:
        self._check_model(request.model)
        info = pb.TokenizerInfo(
            vocab_size=self._codec.vocab_size,
            digest=self._codec.digest,
            has_chat_template=self._chats.has_template,
            added_tokens=[
                pb.AddedToken(id=token.id, content=token.content, special=token.special)
                for token in self._codec.added_tokens
            ],
        )
        yield pb.GetTokenizerResponse(info=info)
        if request.include_files:
            for name in TOKENIZER_FILES:
                path = self._config.model / name
                if path.exists():
                    data = await asyncio.to_thread(path.read_bytes)
                    for chunk in file_chunks(name, data):
                        yield pb.GetTokenizerResponse(chunk=chunk)

    def _check_model(self, model: str) -> None:
        if model not in ("", self._config.name):
            raise QwireError(
                grpc.StatusCode.NOT_FOUND, "no model of that name is served", reason=Reason.MODEL_NOT_FOUND
            )

    def _check_count(self, field: str, count: int) -> None:
        if not 1 <= count <= self._config.max_texts:
            raise invalid(field, f"must be 1 to {self._config.max_texts}, not {count}")


class OpenSequences:
    """The sequences of one Detokenize stream."""

    def __init__(self, detokenizer: Detokenizer, limit: int) -> None:
        self._detokenizer = detokenizer
        self._limit = limit
        self._states: dict[int, DetokenizerState] = {}

    def answer(self, request: pb.DetokenizeRequest) -> Iterable[pb.DetokenizePiece]:
        """Carries out a request, or each of a batch in order; yields a piece for every push and close."""
        match request.WhichOneof("kind"):
            case "batch":
                for part in request.batch.requests:
                    yield from self.answer(part)
            case "open":
                yield from self._open(request.open)
            case "push":
                yield self._push(request.push)
            case "close":
                yield self._close(request.close)
            case _:
                raise QwireError(grpc.StatusCode.INVALID_ARGUMENT, "kind must be set", reason=Reason.INVALID_REQUEST)

    def _open(self, opening: pb.DetokenizeOpen) -> Iterable[pb.DetokenizePiece]:
        self._states.pop(opening.sequence, None)
        if len(self._states) >= self._limit:
            yield _failed(opening.sequence, f"{self._limit} sequences are open already")
            return
        try:
            stop = StopOptions(tuple(opening.stop_strings), opening.include_stop, opening.min_tokens)
        except StopOptionsError as error:
            yield _failed(opening.sequence, str(error))
            return
        state = self._detokenizer.open(opening.start_ids, stop)
        self._states[opening.sequence] = state
        if state.match is not None:  # a caller that lost the answer which said so is told again
            yield pb.DetokenizePiece(sequence=opening.sequence, ids_consumed=state.ids_consumed, match=state.match)

    def _push(self, push: pb.DetokenizePush) -> pb.DetokenizePiece:
        state = self._states.get(push.sequence)
        if state is None:
            return _failed(push.sequence, "the sequence is not open")
        if state.match is None and push.first_index != state.ids_consumed:
            del self._states[push.sequence]
            return _failed(push.sequence, f"ids from index {push.first_index} on, {state.ids_consumed} were there")
        piece = state.push(push.ids)
        return pb.DetokenizePiece(
            sequence=push.sequence, ids_consumed=piece.ids_consumed, text=piece.text, match=piece.match
        )

    def _close(self, close: pb.DetokenizeClose) -> pb.DetokenizePiece:
        state = self._states.pop(close.sequence, None)
        if state is None:
            return _failed(close.sequence, "the sequence is not open")
        return pb.DetokenizePiece(
            sequence=close.sequence, ids_consumed=state.ids_consumed, text=state.flush(), match=state.match, final=True
        )


def message_as_json(message: pb.Message, index: int) -> dict[str, Any]:
    """A message in the shape that chat templates expect."""
    shaped: dict[str, Any] = {"role": ROLES.get(message.role, ""), "content": message.content}
    for name in ("tool_call_id", "name", "reasoning_content"):
        if message.HasField(name):
            shaped[name] = getattr(message, name)
    if message.tool_calls:
        shaped["tool_calls"] = [
            {
                **({"id": call.id} if call.HasField("id") else {}),
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json_object(
                        call.arguments_json, f"chat.messages[{index}].tool_calls[{number}].arguments_json"
                    ),
                },
            }
            for number, call in enumerate(message.tool_calls)
        ]
    return shaped


def tool_as_json(tool: pb.Tool, index: int) -> dict[str, Any]:
    """A tool in the shape that chat templates expect."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.HasField("description"):
        function["description"] = tool.description
    if tool.HasField("parameters_json"):
        function["parameters"] = json_object(tool.parameters_json, f"chat.tools[{index}].parameters_json")
    return {"type": "function", "function": function}


def json_object(text: str, field: str) -> dict[str, Any]:
    """A JSON object from a request; none for no text. Raises QwireError INVALID_ARGUMENT."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise invalid(field, "must be a JSON object")
    return value


def file_chunks(name: str, data: bytes) -> Iterable[pb.FileChunk]:
    """A file in order, at least one chunk."""
    for start in range(0, max(len(data), 1), FILE_CHUNK_BYTES):
        end = start + FILE_CHUNK_BYTES
        yield pb.FileChunk(name=name, data=data[start:end], last=end >= len(data))


def invalid(field: str, description: str) -> QwireError:
    return QwireError(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{field} {description}",
        reason=Reason.INVALID_REQUEST,
        violations=[FieldViolation(field, description)],
    )


def _failed(sequence: int, error: str) -> pb.DetokenizePiece:
    return pb.DetokenizePiece(sequence=sequence, error=error, final=True)


def _chat_error(error: ChatError) -> QwireError:
    """The status for a chat that could not be rendered."""
    match error.failure:
        case ChatFailure.NO_TEMPLATE:
            return QwireError(
                grpc.StatusCode.FAILED_PRECONDITION, "the model has no chat template", reason=Reason.NO_CHAT_TEMPLATE
            )
        case ChatFailure.INVALID_CHAT | ChatFailure.INPUT_LIMIT:
            return invalid(f"chat.{error.field}" if error.field else "chat", str(error))
        case ChatFailure.TEMPLATE_RAISED:
            return QwireError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"the chat template doesn't take these messages: {error.detail}",
                reason=Reason.CHAT_TEMPLATE_FAILED,
                violations=[FieldViolation("chat", error.detail)],
            )
        case ChatFailure.BUSY | ChatFailure.CRASHED:
            return QwireError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), reason=Reason.OVERLOADED, retry_after=1.0)
        case ChatFailure.CLOSED:
            return QwireError(
                grpc.StatusCode.UNAVAILABLE, "the tokenizer service is shutting down", reason=Reason.DRAINING
            )
        case _:
            return QwireError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the chat template failed: {error}",
                reason=Reason.CHAT_TEMPLATE_FAILED,
            )
