"""Conversations as plain dicts, in the shape that OpenAI's API made common, to `qwire.v1` messages.

A key that has no place in `qwire.v1` is refused unless its value is None: nothing a caller says is dropped silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwire.v1 import tokenizer_pb2 as tok

MessageLike = Mapping[str, Any] | tok.Message
ToolLike = Mapping[str, Any] | tok.Tool

_MESSAGE_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content"})


def chat(
    messages: Sequence[MessageLike],
    *,
    tools: Sequence[ToolLike] | None = None,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool | None = None,
) -> tok.Chat:
    """Builds a chat.

    Raises:
        TypeError, ValueError: a message or tool that can't be understood; the text says which and why.
    """
    if isinstance(messages, str | Mapping | tok.Message):
        raise TypeError("messages must be a list of messages")
    result = tok.Chat(
        messages=[_message(value, f"messages[{i}]") for i, value in enumerate(messages)],
        tools=[_tool(value, f"tools[{i}]") for i, value in enumerate(tools or ())],
    )
    options = tok.TemplateOptions(enable_thinking=enable_thinking, add_generation_prompt=add_generation_prompt)
    if options.ByteSize():
        result.template_options.CopyFrom(options)
    return result


def _message(value: MessageLike, path: str) -> tok.Message:
    if isinstance(value, tok.Message):
        return value
    fields = _fields(value, path, _MESSAGE_KEYS)
    calls = fields.get("tool_calls", ())
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise TypeError(f"{path}.tool_calls must be a list")
    return tok.Message(
        role=_role(fields.get("role"), f"{path}.role"),
        content=_content(fields.get("content"), f"{path}.content"),
        tool_calls=[_tool_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(calls)],
        tool_call_id=_text(fields, "tool_call_id", path),
        name=_text(fields, "name", path),
        reasoning_content=_text(fields, "reasoning_content", path),
    )


def _role(value: object, path: str) -> tok.Role.ValueType:
    roles = {
        "system": tok.ROLE_SYSTEM,
        "user": tok.ROLE_USER,
        "assistant": tok.ROLE_ASSISTANT,
        "tool": tok.ROLE_TOOL,
    }
    if not isinstance(value, str) or value not in roles:
        raise ValueError(f"{path} must be one of {', '.join(roles)}, not {value!r}")
    return roles[value]


def _content(value: object, path: str) -> str | None:
    """A text, or the list form with parts of type "text" alone, which mean their concatenation."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise TypeError(f"{path} must be a text or a list of text parts")
    texts = []
    for i, part in enumerate(value):
        fields = _fields(part, f"{path}[{i}]", frozenset({"type", "text"}))
        if fields.get("type") != "text" or not isinstance(fields.get("text"), str):
            raise ValueError(f"{path}[{i}] must be a part of type text")
        texts.append(fields["text"])
    return "".join(texts)


def _tool_call(value: object, path: str) -> tok.ToolCall:
    if isinstance(value, tok.ToolCall):
        return value
    fields = _fields(value, path, frozenset({"id", "type", "function", "index"}))
    function = _function(fields, path)
    inner = _fields(function, f"{path}.function", frozenset({"name", "arguments"}))
    arguments = inner.get("arguments", {})
    return tok.ToolCall(
        id=_text(fields, "id", path),
        name=_text(inner, "name", f"{path}.function", needed=True) or "",
        arguments_json=arguments if isinstance(arguments, str) else _json(arguments, f"{path}.function.arguments"),
    )


def _tool(value: ToolLike, path: str) -> tok.Tool:
    if isinstance(value, tok.Tool):
        return value
    function = _function(_fields(value, path, frozenset({"type", "function"})), path)
    inner = _fields(function, f"{path}.function", frozenset({"name", "description", "parameters"}))
    parameters = inner.get("parameters")
    return tok.Tool(
        name=_text(inner, "name", f"{path}.function", needed=True) or "",
        description=_text(inner, "description", f"{path}.function"),
        parameters_json=None if parameters is None else _json(parameters, f"{path}.function.parameters"),
    )


def _function(fields: Mapping[str, Any], path: str) -> object:
    if fields.get("type", "function") != "function":
        raise ValueError(f'{path}.type must be "function"')
    if "function" not in fields:
        raise ValueError(f"{path}.function is missing")
    return fields["function"]


def _fields(value: object, path: str, known: frozenset[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{path} must be an object")
    fields = {key: item for key, item in value.items() if item is not None}
    unknown = sorted(str(key) for key in fields.keys() - known)
    if unknown:
        raise ValueError(f"{path} has unknown keys: {', '.join(unknown)}")
    return fields


def _text(fields: Mapping[str, Any], key: str, path: str, *, needed: bool = False) -> str | None:
    value = fields.get(key)
    if value is None and needed:
        raise ValueError(f"{path}.{key} is missing")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{path}.{key} must be a text")
    return value


def _json(value: object, path: str) -> str:
    if not isinstance(value, Mapping):
        raise TypeError(f"{path} must be an object")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
