"""The helper process that checks constraints: `python -m worker.constraints.process PARENT_PID`.

A constraint is a program from a client. Compiling one may take minutes, all memory, or the whole stack, and a thread
can't be stopped; so it is compiled here first, under limits, where the parent can kill it. What gets through takes the
worker's own threads about as long. Requests and replies are JSON objects, each after its length as a big-endian uint32,
over stdin and stdout; one reply a request.

    {"kind": json_schema | json_object | regex | grammar | choice, "text": str, "texts": [str], "seconds": float}
    -> {"grammar": str, "bytes": int}: as the library takes it, and how much memory it took when compiled
    -> {"refused": str}: why, in words for whoever sent the constraint

Only the standard library, llguidance and modules beside this one are imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import struct
import sys
import threading
from typing import Any, BinaryIO

import llguidance

from worker.constraints.limits import CHECK_MEMORY_BYTES, CHECK_STACK_BYTES, FUEL, MAX_COMPILED_BYTES
from worker.constraints.schema import SchemaError, check_depth, narrow

_HEADER = struct.Struct(">I")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MAX_DETAIL = 300
_NICENESS = 10

JSON_STYLE: llguidance._lib.JsonCompileOptions = {
    # Where white space is free, small models write it without end.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # A document that passes must pass any validator, whatever "x-guidance" in a schema says.
    "coerce_one_of": False,
    "lenient": False,
}


class Refused(Exception):
    """The constraint can't be used; the text says why."""


def grammar_of(kind: str, text: str, texts: list[str]) -> str:
    """The grammar as the library takes it, not compiled. Raises Refused."""
    match kind:
        case "json_schema":
            try:
                schema = json.loads(text)
                check_depth(schema)
                if not isinstance(schema, dict | bool):
                    raise SchemaError("is no JSON schema: that is an object, or true or false")
                plain = json.dumps(narrow(schema), allow_nan=False)
            except RecursionError as error:
                raise Refused("is nested too deep") from error
            except SchemaError as error:
                raise Refused(str(error)) from error
            except ValueError as error:
                raise Refused(f"is no JSON: {error}") from error
            return llguidance.LLMatcher.grammar_from_json_schema(plain, overrides=JSON_STYLE)
        case "json_object":
            return llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=JSON_STYLE)
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(text)
        case "grammar":
            return llguidance.LLMatcher.grammar_from_lark(text)
        case "choice":
            return llguidance.LLMatcher.grammar_from_regex("|".join(_escape(choice) for choice in texts))
        case _:
            raise Refused("is of no known kind")


def _escape(text: str) -> str:
    """A regular expression for the text itself."""
    return re.sub(r"([^\w\s])", r"\\\1", text, flags=re.ASCII) if text.isascii() else "".join(map(_escape_char, text))


def _escape_char(char: str) -> str:
    return f"\\x{{{ord(char):x}}}"


def limits() -> llguidance.LLParserLimits:
    """What a compiled grammar may take at any time."""
    return llguidance.LLParserLimits(verbose_errors=False, **FUEL)  # type: ignore[arg-type]


def plain_words(message: str) -> str:
    """The library's message about a constraint, on one line and not too long."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= _MAX_DETAIL else line[: _MAX_DETAIL - 3] + "..."


def _check(tokenizer: llguidance.LLTokenizer, request: dict[str, Any]) -> dict[str, Any]:
    before = _resident_bytes()
    try:
        grammar = grammar_of(request["kind"], request["text"], request["texts"])
    except Refused as error:
        return {"refused": str(error)}
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    if matcher.is_error():
        return {"refused": f"can't be followed: {plain_words(matcher.get_error())}"}
    taken = max(0, _resident_bytes() - before)
    if taken > MAX_COMPILED_BYTES:
        return {"refused": f"is too large: it takes {taken} bytes when compiled, {MAX_COMPILED_BYTES} are allowed"}
    return {"grammar": grammar, "bytes": taken}


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _limit_resources() -> None:
    with open("/proc/self/statm", encoding="ascii") as statm:
        base = int(statm.read().split()[0]) * resource.getpagesize()
    most = base + CHECK_STACK_BYTES + CHECK_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # nothing in here writes a file


def _die_with_parent(parent: int) -> None:
    # A check that runs away never sees its stdin end, so the kernel has to do it.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers requests until their end. A check that needs too much ends the process."""
    tokenizer = llguidance.LLTokenizer("byte")  # grammars are the same over any vocabulary, and this one is tiny
    while len(header := requests.read(_HEADER.size)) == _HEADER.size:
        (size,) = _HEADER.unpack(header)
        request = json.loads(requests.read(size))
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # of the CPU's time: SIGPROF ends the process
        reply = json.dumps(_check(tokenizer, request)).encode("ascii")
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(_HEADER.pack(len(reply)) + reply)
        replies.flush()


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes this process in order
    _die_with_parent(int(sys.argv[1]))
    os.nice(_NICENESS)  # whoever generates goes first
    threading.stack_size(CHECK_STACK_BYTES)
    thread = threading.Thread(target=serve, args=(sys.stdin.buffer, sys.stdout.buffer))
    thread.start()
    _limit_resources()
    thread.join()


if __name__ == "__main__":
    main()
