"""Requests from keyword arguments: what both clients and the command line share.

An argument that is left out stays unset in the message, so that the server's default applies. Mistakes that can be
seen without the server (two prompts, an unknown role) raise ValueError or TypeError; limits are the server's to check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from google.protobuf.message import Message as ProtoMessage

from qwire._chat import MessageLike, ToolLike, chat
from qwire.v1 import generation_pb2 as gen
from qwire.v1 import tokenizer_pb2 as tok


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`. Unset or None leaves a value to the server.

    Exactly one of prompt, `chat`, `messages` and `token_ids` is the input. The rest is named as in the
    messages of `qwire.v1`, which give each one's range.
    """

    chat: str | None
    """One user turn, rendered by the model's chat template."""
    messages: Sequence[MessageLike] | None
    """A conversation: dicts as in OpenAI's API, or `qwire.v1` messages."""
    token_ids: Sequence[int] | None
    """The prompt as token ids."""
    tools: Sequence[ToolLike] | None
    enable_thinking: bool | None
    model: str | None
    request_id: str | None

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[int, float] | None
    bad_words: Sequence[str] | None
    allowed_token_ids: Sequence[int] | None
    seed: int | None
    n: int | None

    stop: Sequence[str] | str | None
    stop_token_ids: Sequence[int] | None
    max_tokens: int | None
    min_tokens: int | None
    ignore_eos: bool | None
    include_stop: bool | None

    json_schema: Mapping[str, object] | bool | str | None
    """Hold the output to a JSON schema, as text or as json.loads gives it. One constraint at most."""
    json_object: bool | None
    """Hold it to any JSON object."""
    regex: str | None
    """Hold it to a regular expression."""
    grammar: str | None
    """Hold it to a grammar in Lark's notation."""
    choice: Sequence[str] | None
    """Hold it to one of these texts."""
    free_thinking: bool | None
    """Leave a thinking section free of the constraint."""

    text: bool | None
    """Deliver text."""
    ids: bool | None
    """Deliver token ids."""
    logprobs: int | None
    """Log-probabilities of the drawn token and of this many alternatives."""

    prompt_logprobs: int | None
    """The same for the prompt's tokens but the first; `generate_once` only."""

    priority: int | None
    bypass: bool | None
    """Neither read from the prefix cache nor leave anything in it."""
    scope: str | None
    """Share cached prefixes only within this scope."""
    continuity: Literal["exact", "best-effort"] | None
    """What to do when the worker is lost and none gives exactly the same tokens: end, or go on."""


def generate_request(prompt: str | None, options: GenerateOptions) -> gen.GenerateRequest:
    """Builds the request.

    Raises:
        TypeError: an unknown option, or a value of the wrong type.
        ValueError: not exactly one input, a chat option without a chat, a number that its field can't hold, or a
            message that can't be understood.
    """
    unknown = sorted(options.keys() - GenerateOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"unknown options: {', '.join(unknown)}")
    stop = options.get("stop")
    request = gen.GenerateRequest(
        model=options.get("model") or "",
        request_id=options.get("request_id"),
        priority=options.get("priority"),
        continuity=_continuity(options.get("continuity")),
        **_input(prompt, options),
    )
    _merge(
        request.sampling,
        gen.SamplingParams(
            temperature=options.get("temperature"),
            top_p=options.get("top_p"),
            top_k=options.get("top_k"),
            min_p=options.get("min_p"),
            repetition_penalty=options.get("repetition_penalty"),
            frequency_penalty=options.get("frequency_penalty"),
            presence_penalty=options.get("presence_penalty"),
            logit_bias=options.get("logit_bias"),
            bad_words=options.get("bad_words"),
            allowed_token_ids=options.get("allowed_token_ids"),
            seed=options.get("seed"),
            n=options.get("n"),
        ),
    )
    _merge(
        request.stop,
        gen.StopOptions(
            strings=[stop] if isinstance(stop, str) else stop,
            token_ids=options.get("stop_token_ids"),
            max_tokens=options.get("max_tokens"),
            min_tokens=options.get("min_tokens"),
            ignore_eos=options.get("ignore_eos"),
            include_stop=options.get("include_stop"),
        ),
    )
    _merge(
        request.output,
        gen.OutputOptions(
            logprobs=options.get("logprobs"),
            prompt_logprobs=options.get("prompt_logprobs"),
            text=options.get("text"),
            token_ids=options.get("ids"),
        ),
    )
    if (constraint := _constraint(options)) is not None:
        request.constraint.CopyFrom(constraint)
    _merge(request.prefix_cache, gen.PrefixCacheOptions(bypass=options.get("bypass"), scope=options.get("scope")))
    return request


def _continuity(name: str | None) -> gen.Continuity.ValueType:
    known = {
        None: gen.CONTINUITY_UNSPECIFIED,
        "exact": gen.CONTINUITY_EXACT,
        "best-effort": gen.CONTINUITY_BEST_EFFORT,
    }
    if name not in known:
        raise ValueError(f"continuity is exact or best-effort, not {name!r}")
    return known[name]


def _constraint(options: GenerateOptions) -> gen.Constraint | None:
    schema, choice = options.get("json_schema"), options.get("choice")
    if isinstance(choice, str):
        raise TypeError("choice is a list of texts")
    json_object = gen.Constraint.JsonObject() if options.get("json_object") else None
    kinds = {
        "json_schema": schema if isinstance(schema, str) or schema is None else json.dumps(schema),
        "json_object": json_object,
        "regex": options.get("regex"),
        "grammar": options.get("grammar"),
        "choice": None if choice is None else gen.Constraint.Choice(texts=choice),
    }
    given = {name: value for name, value in kinds.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"one constraint at most, not {' and '.join(given)}")
    free_thinking = options.get("free_thinking")
    if not given and free_thinking is None:
        return None
    return gen.Constraint(**given, free_thinking=free_thinking)  # type: ignore[arg-type]  # Names and types agree.


class _Input(TypedDict, total=False):
    text: str
    token_ids: tok.TokenIds
    chat: tok.Chat


def _input(prompt: str | None, options: GenerateOptions) -> _Input:
    text, messages, token_ids = options.get("chat"), options.get("messages"), options.get("token_ids")
    given = [
        name
        for name, value in (("prompt", prompt), ("chat", text), ("messages", messages), ("token_ids", token_ids))
        if value is not None
    ]
    if len(given) != 1:
        raise ValueError(f"exactly one of prompt, chat, messages and token_ids is needed, not {given or 'none'}")
    tools, enable_thinking = options.get("tools"), options.get("enable_thinking")
    if text is not None:
        messages = [{"role": "user", "content": text}]
    if messages is not None:
        return {"chat": chat(messages, tools=tools, enable_thinking=enable_thinking)}
    if tools is not None or enable_thinking is not None:
        raise ValueError(f"tools and enable_thinking belong to chat or messages, not to {given[0]}")
    if token_ids is not None:
        return {"token_ids": tok.TokenIds(ids=token_ids)}
    return {"text": prompt or ""}


def _merge(target: ProtoMessage, values: ProtoMessage) -> None:
    # An empty submessage would say the same, but a request that sets nothing should look like one.
    if values.ByteSize():
        target.MergeFrom(values)


def encode_request(
    texts: Sequence[str], model: str, add_special_tokens: bool | None, special_tokens_as_text: bool | None
) -> tok.EncodeRequest:
    """The request of `encode` and `encode_batch`."""
    if isinstance(texts, str):
        raise TypeError("texts is a list of texts; use encode for a single one")
    return tok.EncodeRequest(
        model=model,
        texts=texts,
        add_special_tokens=add_special_tokens,
        special_tokens_as_text=special_tokens_as_text,
    )


def decode_request(
    sequences: Sequence[Sequence[int]], model: str, skip_special_tokens: bool | None
) -> tok.DecodeRequest:
    """The request of `decode` and `decode_batch`."""
    return tok.DecodeRequest(
        model=model, sequences=[tok.TokenIds(ids=ids) for ids in sequences], skip_special_tokens=skip_special_tokens
    )


def render_chat_request(
    messages: Sequence[MessageLike],
    *,
    model: str,
    tools: Sequence[ToolLike] | None,
    enable_thinking: bool | None,
    add_generation_prompt: bool | None,
    template_time: int | None,
) -> tok.RenderChatRequest:
    """The request of `render_chat`."""
    return tok.RenderChatRequest(
        model=model,
        chat=chat(messages, tools=tools, enable_thinking=enable_thinking, add_generation_prompt=add_generation_prompt),
        template_time=template_time,
    )
