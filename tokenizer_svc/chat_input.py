"""What a chat may look like before it reaches a template: JSON of bounded size and depth, and known roles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tokenizer_svc.errors import ChatError, ChatFailure

ROLES = ("system", "user", "assistant", "tool")
# transformers takes a turn's reasoning under any of these names.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def plain_message(message: Mapping[str, Any], field: str) -> dict[str, Any]:
    """A message as transformers hands it to a template; ChatError naming `field` for one that is none."""
    if not isinstance(message, Mapping):
        raise ChatError(ChatFailure.INVALID_CHAT, "not an object", field=field)
    if message.get("role") not in ROLES:
        raise ChatError(ChatFailure.INVALID_CHAT, f"must be one of {', '.join(ROLES)}", field=f"{field}.role")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list | tuple):
        raise ChatError(ChatFailure.INVALID_CHAT, "neither a text nor a list of parts", field=f"{field}.content")
    # transformers drops keys without a value. A turn that only calls tools has no content: templates that add it to a
    # text (Qwen3's does) would fail, so it is empty.
    plain = {key: value for key, value in message.items() if value is not None}
    plain.setdefault("content", "")
    reasoning = next((plain[key] for key in REASONING_FIELDS if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


class JsonCheck:
    """Checks that values are JSON, not too deep, and together not over a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0  # about that of the values as JSON

    def visit(self, value: Any, field: str, depth: int) -> None:
        """Raise ChatError naming `field` for a value that breaks a limit; `depth` more levels may be nested."""
        self._size += self._own_size(value, field)
        if self._size > self._limit:
            raise ChatError(ChatFailure.INPUT_LIMIT, f"the chat has more than {self._limit} bytes", field=field)
        if isinstance(value, Mapping | list | tuple):
            if depth == 0:
                raise ChatError(ChatFailure.INPUT_LIMIT, "nested too deeply", field=field)
            for item in value:
                self.visit(item, field, depth - 1)
            if isinstance(value, Mapping):
                for item in value.values():
                    self.visit(item, field, depth - 1)

    def _own_size(self, value: Any, field: str) -> int:
        if isinstance(value, str):
            try:
                return len(value.encode()) + 3
            except UnicodeEncodeError as error:
                raise ChatError(ChatFailure.INVALID_CHAT, "holds a lone surrogate", field=field) from error
        if isinstance(value, int) and value.bit_length() > 64:
            raise ChatError(ChatFailure.INVALID_CHAT, "a number of more than 64 bits", field=field)
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            raise ChatError(ChatFailure.INVALID_CHAT, "a key is not a text", field=field)
        if value is not None and not isinstance(value, bool | int | float | Mapping | list | tuple):
            raise ChatError(ChatFailure.INVALID_CHAT, "not a JSON value", field=field)
        return 8
