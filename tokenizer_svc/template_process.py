"""The helper process that renders chat templates: `python -m tokenizer_svc.template_process PARENT_PID`.

A template is a program out of a model folder. Jinja's sandbox keeps it from objects it should not touch, but cannot
stop it from looping or filling memory; so it runs here, under a memory limit, where the parent can kill it. Requests
and replies are JSON objects, each after its length as a big-endian uint32, over stdin and stdout; one reply a request.

    load    {"templates": {name: source}, "memory_bytes", "output_bytes"}
            -> {"literals": [str], "names": [str]}: the strings that the templates write or compare with, and the
               attribute and item names that they look up
    render  {"template": name, "context": {...}, "now": Unix seconds} -> {"text": str}
    either  -> {"failure": a ChatFailure value, "detail": str}

The environment is set up as transformers does (utils/chat_template_utils.py) with two differences for the sake of
replays: `strftime_now` tells the request's time, in UTC, and the `random` filter starts from the same seed each time.
Only the standard library and jinja2 are imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

_HEADER = struct.Struct(">I")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MAX_DETAIL = 512


class RaisedByTemplate(jinja2.TemplateError):
    """The template called `raise_exception`."""


class OutputLimitError(Exception):
    """A render wrote more than it may."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: marks what an assistant wrote; its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (an instance attribute in the base class)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class PlainDict:
    """`dict(...)` for templates, without the attributes of Python's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class PlainNamespace(jinja2.utils.Namespace):
    """`namespace(...)` whose attributes cannot begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named parameters: `namespace(self=...)` is allowed
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("a namespace attribute begins with an underscore")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise RaisedByTemplate(str(message))


class TemplateHost:
    """The compiled templates of one model."""

    def __init__(self, sources: dict[str, str], output_bytes: int) -> None:
        """Raises jinja2.TemplateError for a template that does not parse or looks up what it must not."""
        self._output_bytes = output_bytes
        self._now = 0.0
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self._strftime_now
        environment.globals["dict"] = PlainDict()
        environment.globals["namespace"] = PlainNamespace
        self.literals: set[str] = set()
        self.names: set[str] = set()
        for source in sources.values():
            self._inspect(environment.parse(source))
        self._templates = {name: environment.from_string(source) for name, source in sources.items()}

    def _inspect(self, tree: jinja2.nodes.Template) -> None:
        for node in tree.find_all((jinja2.nodes.TemplateData, jinja2.nodes.Const, jinja2.nodes.Getattr)):
            if isinstance(node, jinja2.nodes.TemplateData):
                self.literals.add(node.data)
            elif isinstance(node, jinja2.nodes.Getattr):
                self.names.add(node.attr)
                # The sandbox would stop it at render; no honest template does this, so it is not even loaded.
                if node.attr.startswith("_"):
                    raise jinja2.exceptions.SecurityError(f"line {node.lineno}: an attribute begins with an underscore")
            elif isinstance(node, jinja2.nodes.Const) and isinstance(node.value, str):
                self.literals.add(node.value)
                if re.search(r"__\w+__", node.value):
                    raise jinja2.exceptions.SecurityError(f"line {node.lineno}: a string names an internal attribute")
        for item in tree.find_all(jinja2.nodes.Getitem):
            if isinstance(item.arg, jinja2.nodes.Const) and isinstance(item.arg.value, str):
                self.names.add(item.arg.value)

    def _strftime_now(self, pattern: str) -> str:
        return datetime.fromtimestamp(self._now, UTC).replace(tzinfo=None).strftime(pattern)

    def render(self, name: str, context: dict[str, Any], now: float) -> str:
        """Raises jinja2.TemplateError, OutputLimitError, or whatever the template's operations raise."""
        self._now = now
        random.seed(0)
        return "".join(self._pieces(self._templates[name].generate(context)))

    def _pieces(self, pieces: Iterator[str]) -> Iterator[str]:
        left = self._output_bytes
        for piece in pieces:
            # Characters first: encoding a piece that is far too long would only cost memory.
            left -= len(piece) if len(piece) > left else len(piece.encode("utf-8", "surrogatepass"))
            if left < 0:
                raise OutputLimitError
            yield piece


def _limit_resources(memory_bytes: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as statm:
        base = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + memory_bytes, base + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # nothing in here writes a file


def _die_with_parent(parent: int) -> None:
    # A looping template never sees its stdin end, so the kernel has to do it.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def _read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    (size,) = _HEADER.unpack(header)
    body = stream.read(size)
    if len(body) < size:
        return None
    frame: dict[str, Any] = json.loads(body)
    return frame


def _answer(host: TemplateHost | None, request: dict[str, Any]) -> tuple[TemplateHost | None, dict[str, Any]]:
    loading = "templates" in request
    try:
        if loading:
            _limit_resources(request["memory_bytes"])
            host = TemplateHost(request["templates"], request["output_bytes"])
            return host, {"literals": sorted(host.literals), "names": sorted(host.names)}
        if host is None:
            return host, {"failure": "crashed", "detail": "no template was loaded"}
        return host, {"text": host.render(request["template"], request["context"], request["now"])}
    except OutputLimitError:
        return host, {"failure": "output_limit", "detail": ""}
    except MemoryError:
        return host, {"failure": "memory_limit", "detail": ""}
    except RaisedByTemplate as error:
        return host, {"failure": "template_raised", "detail": str(error.message)[:_MAX_DETAIL]}
    except jinja2.exceptions.SecurityError as error:
        return host, {"failure": "template_refused", "detail": str(error)[:_MAX_DETAIL] if loading else ""}
    except Exception as error:
        # Anything at all: a template is a program and its errors are of every type. While loading no chat is at hand,
        # so the text says only what the template's author wrote; while rendering it could hold messages.
        detail = f"{type(error).__name__}: {error}"[:_MAX_DETAIL] if loading else type(error).__name__
        return host, {"failure": "template_refused" if loading else "template_failed", "detail": detail}


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until their end, or until memory ran out: then what is left of the heap is not to be trusted."""
    host: TemplateHost | None = None
    while (request := _read_frame(requests)) is not None:
        host, reply = _answer(host, request)
        del request
        try:
            body = json.dumps(reply).encode("ascii")
        except MemoryError:
            reply = {"failure": "memory_limit", "detail": ""}
            body = json.dumps(reply).encode("ascii")
        replies.write(_HEADER.pack(len(body)) + body)
        replies.flush()
        if reply.get("failure") == "memory_limit":
            return


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes this process in order
    _die_with_parent(int(sys.argv[1]))
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
