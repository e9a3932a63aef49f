"""What a request may ask for, checked before anything is allocated for it.

Checks come in two rounds: fields by themselves, then, once model and prompt length are known, what depends on those.
Each round names every violation it finds, not just the first.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from qwire.errors import FieldViolation, QwireError, Reason
from qwire.ordering import MAX_PRIORITY, MIN_PRIORITY
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import models_pb2, tokenizer_pb2
from router.config import RouterConfig

MAX_REQUEST_ID = 128
MAX_TEMPERATURE = 100.0
MAX_LOGIT_BIAS = 100
MAX_SCOPE_BYTES = 128
MAX_TEMPLATE_ARGUMENTS_BYTES = 16 * 1024
MAX_TOOL_CALLS = 128
"""Of one message."""
MAX_VIOLATIONS = 64
"""Checks of lists end after so many: a request can hold a million wrong things, and an answer can't."""
PRINTABLE = frozenset(string.printable) - frozenset(string.whitespace)


@dataclass(slots=True)
class Violations:
    """Collects what is wrong with a request."""

    wrong: list[FieldViolation] = field(default_factory=list)
    absent: list[FieldViolation] = field(default_factory=list)
    """Fields that this release doesn't have."""

    @property
    def full(self) -> bool:
        return len(self.wrong) >= MAX_VIOLATIONS

    def add(self, name: str, description: str) -> None:
        self.wrong.append(FieldViolation(name, description))

    def not_yet(self, name: str) -> None:
        self.absent.append(FieldViolation(name, "is not in this release"))

    def raise_if_any(self) -> None:
        found = [*self.wrong, *self.absent]
        if not found:
            return
        raise QwireError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "; ".join(f"{violation.field} {violation.description}" for violation in found),
            reason=Reason.INVALID_REQUEST if self.wrong else Reason.NOT_IN_THIS_RELEASE,
            violations=found,
        )


def check(request: pb.GenerateRequest, config: RouterConfig, *, once: bool = False) -> None:
    """Checks all that needs neither model nor tokenizer. Raises QwireError INVALID_ARGUMENT with every violation.

    Args:
        once: the answer comes in one piece, not as a stream.
    """
    found = Violations()
    if request.HasField("request_id") and not (
        1 <= len(request.request_id) <= MAX_REQUEST_ID and PRINTABLE.issuperset(request.request_id)
    ):
        found.add("request_id", f"must be 1 to {MAX_REQUEST_ID} printable ASCII characters without spaces")
    match request.WhichOneof("input"):
        case "text":
            if not request.text:
                found.add("text", "must not be empty")
        case "token_ids":
            if not request.token_ids.ids:
                found.add("token_ids.ids", "must not be empty")
        case "chat":
            check_chat(request.chat, config, found)
        case _:
            found.add("input", "must be set: one of text, token_ids and chat")
    _check_sampling(request.sampling, config, found)
    _check_stop(request.stop, config, found)
    _check_output(request.output, config, found, once=once)
    if request.HasField("constraint"):
        _check_constraint(request.constraint, config, found)
    if request.HasField("priority") and not MIN_PRIORITY <= request.priority <= MAX_PRIORITY:
        found.add("priority", f"must be in [{MIN_PRIORITY}, {MAX_PRIORITY}], not {request.priority}")
    if request.HasField("adapter"):
        found.not_yet("adapter")
    if request.continuity not in pb.Continuity.values():
        found.add("continuity", f"is none of the known values: {request.continuity}")
    if len(request.prefix_cache.scope.encode()) > MAX_SCOPE_BYTES:
        found.add("prefix_cache.scope", f"must be at most {MAX_SCOPE_BYTES} bytes")
    found.raise_if_any()


def check_chat(chat: tokenizer_pb2.Chat, config: RouterConfig, found: Violations, path: str = "chat") -> None:
    """Checks messages, tools and template options."""
    if not chat.messages:
        found.add(f"{path}.messages", "must not be empty")
    if len(chat.messages) > config.max_messages:
        found.add(f"{path}.messages", f"must be at most {config.max_messages}, not {len(chat.messages)}")
    if len(chat.tools) > config.max_tools:
        found.add(f"{path}.tools", f"must be at most {config.max_tools}, not {len(chat.tools)}")
    for index, message in enumerate(chat.messages[: config.max_messages]):
        if found.full:
            break
        _check_message(message, f"{path}.messages[{index}]", found)
    for index, tool in enumerate(chat.tools[: config.max_tools]):
        if not tool.name:
            found.add(f"{path}.tools[{index}].name", "must not be empty")
        if tool.HasField("parameters_json"):
            _check_json_object(tool.parameters_json, f"{path}.tools[{index}].parameters_json", found)
    options = chat.template_options
    if options.HasField("arguments_json"):
        name = f"{path}.template_options.arguments_json"
        if len(options.arguments_json.encode()) > MAX_TEMPLATE_ARGUMENTS_BYTES:
            found.add(name, f"must be at most {MAX_TEMPLATE_ARGUMENTS_BYTES} bytes")
        else:
            arguments = _check_json_object(options.arguments_json, name, found)
            reserved = {"messages", "tools", "enable_thinking", "add_generation_prompt"} & arguments.keys()
            if reserved:
                found.add(name, f"must not set {', '.join(sorted(reserved))}")


def _check_message(message: tokenizer_pb2.Message, path: str, found: Violations) -> None:
    assistant, tool = tokenizer_pb2.ROLE_ASSISTANT, tokenizer_pb2.ROLE_TOOL
    if message.role == tokenizer_pb2.ROLE_UNSPECIFIED or message.role not in tokenizer_pb2.Role.values():
        found.add(f"{path}.role", "must be system, user, assistant or tool")
    if not message.HasField("content") and not (message.role == assistant and message.tool_calls):
        found.add(f"{path}.content", "must be set, save for an assistant message with tool calls")
    if message.tool_calls and message.role != assistant:
        found.add(f"{path}.tool_calls", "belong to assistant messages")
    if message.HasField("tool_call_id") and message.role != tool:
        found.add(f"{path}.tool_call_id", "belongs to tool messages")
    if message.HasField("reasoning_content") and message.role != assistant:
        found.add(f"{path}.reasoning_content", "belongs to assistant messages")
    if len(message.tool_calls) > MAX_TOOL_CALLS:
        found.add(f"{path}.tool_calls", f"must be at most {MAX_TOOL_CALLS}, not {len(message.tool_calls)}")
    for index, call in enumerate(message.tool_calls[:MAX_TOOL_CALLS]):
        if not call.name:
            found.add(f"{path}.tool_calls[{index}].name", "must not be empty")
        _check_json_object(call.arguments_json, f"{path}.tool_calls[{index}].arguments_json", found)


def _check_json_object(text: str, path: str, found: Violations) -> dict[str, object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    found.add(path, "must be a JSON object")
    return {}


def _check_sampling(sampling: pb.SamplingParams, config: RouterConfig, found: Violations) -> None:
    def number(name: str, low: float, high: float, *, low_open: bool = False, high_open: bool = False) -> None:
        if not sampling.HasField(name):  # type: ignore[arg-type]
            return
        value = getattr(sampling, name)
        inside = (low < value if low_open else low <= value) and (value < high if high_open else value <= high)
        if not inside:  # NaN is inside nothing
            interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
            found.add(f"sampling.{name}", f"must be in {interval}, not {value:g}")

    number("temperature", 0, MAX_TEMPERATURE)
    number("top_p", 0, 1, low_open=True)
    number("min_p", 0, 1, high_open=True)
    number("top_k", 0, math.inf)
    number("repetition_penalty", 0, 10, low_open=True)
    number("frequency_penalty", -2, 2)
    number("presence_penalty", -2, 2)
    number("n", 1, config.max_choices)
    for name, limit in (
        ("logit_bias", config.max_logit_bias),
        ("allowed_token_ids", config.max_logit_bias),
        ("bad_words", config.max_bad_words),
    ):
        entries = getattr(sampling, name)
        if len(entries) > limit:
            found.add(f"sampling.{name}", f"must have at most {limit} entries, not {len(entries)}")
    for token, bias in sampling.logit_bias.items():
        if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            found.add(
                f"sampling.logit_bias[{token}]", f"must be in [-{MAX_LOGIT_BIAS}, {MAX_LOGIT_BIAS}], not {bias:g}"
            )
    for index, word in enumerate(sampling.bad_words[: config.max_bad_words]):
        size = len(word.encode())
        if not 1 <= size <= config.max_stop_string_bytes:
            found.add(f"sampling.bad_words[{index}]", f"must be 1 to {config.max_stop_string_bytes} bytes, not {size}")


def _check_stop(stop: pb.StopOptions, config: RouterConfig, found: Violations) -> None:
    if len(stop.strings) > config.max_stop_strings:
        found.add("stop.strings", f"must be at most {config.max_stop_strings}, not {len(stop.strings)}")
    for index, text in enumerate(stop.strings[: config.max_stop_strings]):
        size = len(text.encode())
        if not 1 <= size <= config.max_stop_string_bytes:
            found.add(f"stop.strings[{index}]", f"must be 1 to {config.max_stop_string_bytes} bytes, not {size}")
    if len(stop.token_ids) > config.max_stop_token_ids:
        found.add("stop.token_ids", f"must be at most {config.max_stop_token_ids}, not {len(stop.token_ids)}")
    if stop.HasField("max_tokens") and stop.max_tokens < 1:
        found.add("stop.max_tokens", f"must be at least 1, not {stop.max_tokens}")
    if stop.HasField("min_tokens"):
        if stop.min_tokens < 0:
            found.add("stop.min_tokens", f"must not be negative: {stop.min_tokens}")
        elif stop.HasField("max_tokens") and stop.min_tokens > stop.max_tokens >= 1:
            found.add("stop.min_tokens", f"must be at most max_tokens {stop.max_tokens}, not {stop.min_tokens}")


def _check_output(output: pb.OutputOptions, config: RouterConfig, found: Violations, *, once: bool) -> None:
    if output.HasField("logprobs") and not 0 <= output.logprobs <= config.max_logprobs:
        found.add("output.logprobs", f"must be in [0, {config.max_logprobs}], not {output.logprobs}")
    if not output.HasField("prompt_logprobs"):
        return
    if not once:
        found.add("output.prompt_logprobs", "is for GenerateOnce: a stream doesn't carry them")
    elif not 0 <= output.prompt_logprobs <= config.max_logprobs:
        found.add("output.prompt_logprobs", f"must be in [0, {config.max_logprobs}], not {output.prompt_logprobs}")


def _check_constraint(constraint: pb.Constraint, config: RouterConfig, found: Violations) -> None:
    """What can be seen without the grammar library: the rest is the worker's to refuse."""
    most = config.max_constraint_bytes
    match kind := constraint.WhichOneof("kind"):
        case None:
            found.add("constraint", "must be one of json_schema, json_object, regex, grammar and choice")
        case "choice":
            texts = constraint.choice.texts
            size = sum(len(text.encode()) for text in texts)
            if not 1 <= len(texts) <= config.max_constraint_texts:
                found.add("constraint.choice.texts", f"must be 1 to {config.max_constraint_texts}, not {len(texts)}")
            if size > most:
                found.add("constraint.choice.texts", f"must be at most {most} bytes together, not {size}")
            for index, text in enumerate(texts[: config.max_constraint_texts]):
                if found.full:
                    break
                if not text:
                    found.add(f"constraint.choice.texts[{index}]", "must not be empty")
        case "json_schema" | "regex" | "grammar":
            size = len(getattr(constraint, kind).encode())
            if not 1 <= size <= most:
                found.add(f"constraint.{kind}", f"must be 1 to {most} bytes, not {size}")


def check_prompt(
    request: pb.GenerateRequest, prompt_ids: Sequence[int], model: models_pb2.ModelInfo, config: RouterConfig
) -> None:
    """Checks what depends on the model and on the prompt's tokens. Raises QwireError INVALID_ARGUMENT."""
    found = Violations()
    if request.HasField("constraint") and models_pb2.CAPABILITY_CONSTRAINTS not in model.capabilities:
        found.add("constraint", f"is not possible with {model.name}: its folder has no tokenizer that grammars can use")
    given_ids = request.WhichOneof("input") == "token_ids"
    where = {"text": "text", "chat": "chat", "token_ids": "token_ids.ids"}[request.WhichOneof("input") or "text"]
    if given_ids:
        for index, token in enumerate(prompt_ids[: model.context_length]):
            if token >= model.vocab_size:
                found.add(
                    f"token_ids.ids[{index}]", f"must be below the vocabulary size {model.vocab_size}, not {token}"
                )
                break  # one such id says it all; a million of them would not fit an answer
    for name, ids in (
        ("stop.token_ids", list(request.stop.token_ids)),
        ("sampling.allowed_token_ids", list(request.sampling.allowed_token_ids)),
        ("sampling.logit_bias", sorted(request.sampling.logit_bias)),
    ):
        for index, token in enumerate(ids):
            if token >= model.vocab_size:
                key = token if name == "sampling.logit_bias" else index
                found.add(f"{name}[{key}]", f"must be below the vocabulary size {model.vocab_size}, not {token}")
    if request.output.HasField("prompt_logprobs"):
        count = len(prompt_ids) * (1 + request.output.prompt_logprobs)
        if count > config.max_prompt_logprobs:
            found.add(
                "output.prompt_logprobs",
                f"asks for {count} log-probabilities of {len(prompt_ids)} prompt tokens, alternatives counted; "
                f"at most {config.max_prompt_logprobs} are given",
            )
    if not prompt_ids:
        found.add(where, "gives no tokens")
    if len(prompt_ids) >= model.context_length:
        found.add(
            where,
            f"has {len(prompt_ids)} tokens; the context length of {model.name} is {model.context_length}, "
            "one of which at least is to be generated",
        )
    elif request.stop.HasField("max_tokens") and len(prompt_ids) + request.stop.max_tokens > model.context_length:
        found.add(
            "stop.max_tokens",
            f"must be at most {model.context_length - len(prompt_ids)}: {len(prompt_ids)} prompt tokens and "
            f"{request.stop.max_tokens} more exceed the context length {model.context_length} of {model.name}",
        )
    elif request.stop.min_tokens > (most := _max_tokens(request, len(prompt_ids), model, config)):
        found.add("stop.min_tokens", f"must be at most the {most} tokens that can be generated")
    found.raise_if_any()


def resolve(
    request: pb.GenerateRequest,
    prompt_tokens: int,
    model: models_pb2.ModelInfo,
    config: RouterConfig,
    tenant: str = "",
) -> tuple[pb.SamplingParams, pb.StopOptions]:
    """Every sampling and stop value as it will be used: the request's own, else the model's default."""
    asked, default = request.sampling, model.default_sampling
    sampling = pb.SamplingParams(
        temperature=asked.temperature if asked.HasField("temperature") else default.temperature,
        top_p=asked.top_p if asked.HasField("top_p") else default.top_p,
        top_k=asked.top_k if asked.HasField("top_k") else default.top_k,
        min_p=asked.min_p if asked.HasField("min_p") else default.min_p,
        repetition_penalty=asked.repetition_penalty
        if asked.HasField("repetition_penalty")
        else default.repetition_penalty,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        logit_bias=asked.logit_bias,
        seed=asked.seed if asked.HasField("seed") else _seed(request, tenant),
        n=asked.n if asked.HasField("n") else 1,
        bad_words=asked.bad_words,
        allowed_token_ids=asked.allowed_token_ids,
    )
    stop = pb.StopOptions(
        strings=request.stop.strings,
        token_ids=request.stop.token_ids,
        max_tokens=_max_tokens(request, prompt_tokens, model, config),
        min_tokens=request.stop.min_tokens,
        ignore_eos=request.stop.ignore_eos,
        include_stop=request.stop.include_stop,
    )
    return sampling, stop


def _max_tokens(
    request: pb.GenerateRequest, prompt_tokens: int, model: models_pb2.ModelInfo, config: RouterConfig
) -> int:
    if request.stop.HasField("max_tokens"):
        return request.stop.max_tokens
    return min(model.context_length - prompt_tokens, config.default_max_tokens)


def _seed(request: pb.GenerateRequest, tenant: str) -> int:
    """A retry under the tenant's own request id draws the same tokens; without one, every call draws anew."""
    if request.HasField("request_id"):
        name = f"{tenant}\0{request.request_id}" if tenant else request.request_id
        return int.from_bytes(hashlib.sha256(b"qwire seed\0" + name.encode()).digest()[:8], "little")
    return secrets.randbits(64)
