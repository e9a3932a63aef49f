"""Chats to token ids through the model's own template.

Invariant: an added token in the result was written by the template or stands in an assistant turn's own text. For
chats in which nobody else writes added tokens, the ids are those of transformers' `apply_chat_template`.

    check the chat -> break markers in untrusted strings -> render in the helper -> split at added tokens -> encode

Trusted: an assistant turn's content and reasoning. Untrusted: all else that comes with a request, the names and
arguments of tool calls included.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizer_svc.chat_input import REASONING_FIELDS, ROLES, JsonCheck, plain_message, strings_in
from tokenizer_svc.codec import Codec, read_json_object
from tokenizer_svc.errors import ChatError, ChatFailure, TokenizerLoadError
from tokenizer_svc.markers import MarkerGuard, Seams, Segment, choose_sentinel, encode_segments
from tokenizer_svc.template_client import ChatLimits, HelperGoneError, TemplateHelper

_TRUSTED = {"content", *REASONING_FIELDS}
_VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
# Names that the renderer, the sandbox or Jinja itself gives a meaning.
_RESERVED = frozenset({
    "messages", "tools", "documents", "add_generation_prompt", "enable_thinking", "raise_exception", "strftime_now",
    "namespace", "dict", "range", "cycler", "joiner", "lipsum", "loop", "self", "caller", "varargs", "kwargs",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "chat_template", "tokenize", "continue_final_message",
})  # fmt: skip


class ChatRenderer:
    """Renders chats for one model, one at a time, in a helper process that is started when first needed.

    Use as an async context manager, or `start` and `aclose`. All of it belongs to one event loop.
    """

    def __init__(self, codec: Codec, templates: Mapping[str, str], limits: ChatLimits | None = None) -> None:
        """
        Args:
            templates: `load_templates(folder)`; an empty mapping makes every render fail with NO_TEMPLATE.

        Raises:
            TokenizerLoadError: a template is too long, or the tokenizer's added tokens cannot be told apart from text.
        """
        self._limits = limits or ChatLimits()
        for name, source in templates.items():
            if len(source.encode("utf-8", "surrogatepass")) > self._limits.template_bytes:
                raise TokenizerLoadError(f"chat template {name!r} is over {self._limits.template_bytes} bytes")
        self._codec = codec
        self._templates = dict(templates)
        self._guard = MarkerGuard(codec) if templates else None
        self._helper: TemplateHelper | None = None
        self._template_seams: Seams = frozenset()
        self._lock = asyncio.Lock()
        self._waiting = 0
        self._closed = False

    @classmethod
    def load(cls, codec: Codec, folder: str | Path, limits: ChatLimits | None = None) -> ChatRenderer:
        """A renderer for the templates of a model folder. Raises TokenizerLoadError."""
        return cls(codec, load_templates(folder), limits)

    @property
    def has_template(self) -> bool:
        """Whether the model has one to render chats with."""
        return bool(self._templates)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Start the helper now rather than at the first render, and so learn whether the template is any good.

        Raises:
            ChatError: TEMPLATE_REFUSED, CRASHED, CLOSED. A model without a template is fine.
        """
        if self._templates:
            async with self._lock:
                await self._running_helper()

    async def aclose(self) -> None:
        """End the helper; a render that runs or waits fails with CLOSED."""
        self._closed = True
        if self._helper is not None:
            await self._helper.kill()
        async with self._lock:  # a helper that was just being started
            if self._helper is not None:
                await self._helper.kill()
                self._helper = None

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
        time: float = 0.0,
    ) -> list[Segment]:
        """Render a chat; `encode_segments(codec, segments)` gives its ids.

        Args:
            messages: JSON objects with a `role` of ROLES, a `content` (text, a list of {"type": "text", "text": …}, or
                none), and what else the template knows: `tool_calls`, `reasoning_content`, `name`.
            tools: JSON objects in the form the template expects: {"type": "function", "function": {…}}.
            enable_thinking: given to the template unless None.
            extra: further JSON values for the template, by variable name.
            time: what `strftime_now` shows, in Unix seconds; the same time renders the same text.

        Raises:
            ChatError: with its `failure` telling why.
        """
        guard = self._guard
        if guard is None:
            raise ChatError(ChatFailure.NO_TEMPLATE, "the model has no chat template")
        context = self._context(messages, tools, enable_thinking, add_generation_prompt, extra)
        if not math.isfinite(time) or not 0 <= time < 1 << 37:  # the year 6325; strftime needs one of four digits
            raise ChatError(ChatFailure.INVALID_CHAT, "not a Unix time in seconds", field="time")
        if self._waiting > self._limits.max_waiting:
            raise ChatError(ChatFailure.BUSY, f"{self._limits.max_waiting} renders are waiting, the most allowed")
        self._waiting += 1
        try:
            await self._lock.acquire()
        except BaseException:
            self._waiting -= 1
            raise
        # A caller who gives up must not leave a reply in the pipe for the next one: the exchange goes on without him.
        exchange = asyncio.ensure_future(self._exchange(guard, context, time))
        exchange.add_done_callback(self._exchange_done)
        return await asyncio.shield(exchange)

    async def render_ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """`render` and `encode_segments` in one; encodes on the calling thread."""
        return encode_segments(self._codec, await self.render(messages, **options))

    def _exchange_done(self, exchange: asyncio.Future[list[Segment]]) -> None:
        self._waiting -= 1
        self._lock.release()
        if not exchange.cancelled():
            exchange.exception()  # seen, even if the caller is gone

    async def _exchange(self, guard: MarkerGuard, context: dict[str, Any], time: float) -> list[Segment]:
        for attempt in (1, 2):
            helper = await self._running_helper()
            request, sentinel = self._request(guard, helper, context, time)
            try:
                reply = await helper.ask(request, self._limits.render_seconds)
                break
            except TimeoutError as error:
                message = f"rendering took more than {self._limits.render_seconds:g} s"
                raise ChatError(ChatFailure.TIME_LIMIT, message) from error
            except HelperGoneError as error:
                # It may have been dead before it was asked; dying twice in a row is the render's doing.
                if self._closed or attempt == 2:
                    failure = ChatFailure.CLOSED if self._closed else ChatFailure.CRASHED
                    raise ChatError(failure, "the template helper ended") from error
        if "failure" in reply:
            failure = ChatFailure(reply["failure"])
            if failure is ChatFailure.MEMORY_LIMIT:
                await helper.kill()  # what is left of its heap is not to be trusted
            raise self._failed(failure, str(reply["detail"]))
        return guard.split(reply["text"], sentinel)

    def _failed(self, failure: ChatFailure, detail: str) -> ChatError:
        if failure is ChatFailure.TEMPLATE_RAISED:
            return ChatError(failure, "the chat template does not take this chat", detail=detail)
        if failure is ChatFailure.OUTPUT_LIMIT:
            return ChatError(failure, f"the rendered chat is over {self._limits.output_bytes} bytes")
        if failure is ChatFailure.MEMORY_LIMIT:
            return ChatError(failure, f"rendering took more than {self._limits.memory_bytes} bytes of memory")
        if failure is ChatFailure.TEMPLATE_REFUSED:
            return ChatError(failure, "the chat template reached for something that the sandbox forbids")
        return ChatError(failure, f"the chat template failed on this chat ({detail})")

    async def _running_helper(self) -> TemplateHelper:
        if self._closed:
            raise ChatError(ChatFailure.CLOSED, "the renderer is closed")
        if self._helper is None or not self._helper.alive:
            self._helper = await TemplateHelper.start(self._templates, self._limits)
            if self._guard is not None:
                trusted = (*self._helper.literals, *ROLES, *self._codec.named_tokens.values())
                self._template_seams = self._guard.seams(trusted)
        return self._helper

    def _request(
        self, guard: MarkerGuard, helper: TemplateHelper, context: dict[str, Any], time: float
    ) -> tuple[bytes, str]:
        """The helper's request, and the sentinel that breaks the markers in it."""
        sentinel = choose_sentinel(
            [*self._templates.values(), *self._codec.named_tokens.values(), *strings_in(context)]
        )
        trusted = [
            text
            for message in context["messages"]
            if message["role"] == "assistant"
            for field in _TRUSTED
            for text in strings_in(message.get(field))
        ]
        seams = guard.seams(trusted, self._template_seams)

        def broken(value: Any) -> Any:
            return guard.break_value(value, sentinel, seams, helper.names)

        messages = []
        for message in context["messages"]:
            kept = ("role", *_TRUSTED) if message["role"] == "assistant" else ("role",)
            messages.append({key: value if key in kept else broken(value) for key, value in message.items()})
        variables = {key: broken(value) for key, value in context.items() if key != "messages"}
        rendered = {**self._codec.named_tokens, **variables, "messages": messages}
        name = "tool_use" if context["tools"] is not None and "tool_use" in self._templates else "default"
        request = {"template": name, "context": rendered, "now": time}
        return json.dumps(request).encode("ascii"), sentinel

    def _context(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        enable_thinking: bool | None,
        add_generation_prompt: bool,
        extra: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """The template's variables as plain JSON values, checked."""
        if not messages:
            raise ChatError(ChatFailure.INVALID_CHAT, "empty", field="messages")
        check = JsonCheck(self._limits.input_bytes)
        for field, values in (("messages", messages), ("tools", tools or ())):
            for index, value in enumerate(values):
                check.visit(value, f"{field}[{index}]", self._limits.input_depth)
        for name, value in (extra or {}).items():
            check.visit(name, "extra", 1)
            check.visit(value, f"extra.{name}", self._limits.input_depth)
        for index, tool in enumerate(tools or ()):
            if not isinstance(tool, Mapping):
                raise ChatError(ChatFailure.INVALID_CHAT, "not an object", field=f"tools[{index}]")
        for name in extra or ():
            if not _VARIABLE.fullmatch(name) or name in _RESERVED:
                raise ChatError(ChatFailure.INVALID_CHAT, "not a name for a template variable", field="extra")
        context: dict[str, Any] = {
            **(extra or {}),
            "messages": [plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)],
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if enable_thinking is not None:
            context["enable_thinking"] = enable_thinking
        return context


def load_templates(folder: str | Path) -> dict[str, str]:
    """The chat templates of a model folder by name, "default" and perhaps "tool_use"; {} where there is none.

    They are in chat_template.jinja, which comes first, or in tokenizer_config.json as `chat_template`: one template, or
    a list of {"name", "template"}.

    Raises:
        TokenizerLoadError: a file is corrupt, or templates are named but none is the default.
    """
    path = Path(folder)
    try:
        return {"default": (path / "chat_template.jinja").read_text("utf-8")}
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerLoadError("cannot read chat_template.jinja as UTF-8") from error
    found = read_json_object(path / "tokenizer_config.json").get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        named = {str(entry["name"]): str(entry["template"]) for entry in found}
    except (KeyError, TypeError) as error:
        raise TokenizerLoadError("tokenizer_config.json: chat_template is neither a text nor a list") from error
    if "default" not in named:
        raise TokenizerLoadError("tokenizer_config.json: no chat_template is named default")
    return {name: source for name, source in named.items() if name in ("default", "tool_use")}
