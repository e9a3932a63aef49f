"""`qwire generate`, `chat` and `models` against a scripted server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from qwire.cli import main
from qwire.errors import FieldViolation, QwireError
from qwire.v1 import generation_pb2 as gen
from qwire.v1 import tokenizer_pb2 as tok
from tests.helpers.fake_server import FakeServer, Hang, accepted, delta, finished

ROOT = Path(__file__).parents[2]
REFUSAL = QwireError(
    grpc.StatusCode.INVALID_ARGUMENT,
    "the request is wrong",
    reason="INVALID_REQUEST",
    violations=[FieldViolation("sampling.top_p", "must be in (0, 1]; is 2"), FieldViolation("stop", "too many")],
    retry_after=1.5,
)


def run(server: FakeServer, *args: str, **options: Any) -> Result:
    command, *rest = args
    return CliRunner().invoke(main, [command, "--address", server.address, *rest], **options)


def test_text(server: FakeServer) -> None:
    result = run(server, "generate", "--prompt", "hi")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Héllo!\n", "")
    assert server.requests == [gen.GenerateRequest(text="hi")]


def test_every_flag(server: FakeServer) -> None:
    flags = (
        "--token-ids 1,2,3 --model m --max-tokens 8 --min-tokens 1 --temperature 0.5 --top-p 0.25 --top-k 3 "
        "--min-p 0.125 --repetition-penalty 1.5 --frequency-penalty 0.5 --presence-penalty -0.5 --seed 7 --n 1 "
        "--stop a --stop b --stop-token-ids 4,5 --stop-token-ids 6 --ignore-eos --include-stop --logprobs 2 "
        "--request-id r --priority -1 --bypass --scope s --timeout 20 --tenant t"
    )
    assert run(server, "generate", *flags.split()).exit_code == 0
    assert server.requests == [
        gen.GenerateRequest(
            model="m",
            request_id="r",
            token_ids=tok.TokenIds(ids=[1, 2, 3]),
            priority=-1,
            sampling=gen.SamplingParams(
                temperature=0.5,
                top_p=0.25,
                top_k=3,
                min_p=0.125,
                repetition_penalty=1.5,
                frequency_penalty=0.5,
                presence_penalty=-0.5,
                seed=7,
                n=1,
            ),
            stop=gen.StopOptions(
                strings=["a", "b"], token_ids=[4, 5, 6], max_tokens=8, min_tokens=1, ignore_eos=True, include_stop=True
            ),
            output=gen.OutputOptions(logprobs=2),
            prefix_cache=gen.PrefixCacheOptions(bypass=True, scope="s"),
        )
    ]
    assert server.remaining[0] is not None
    assert server.metadata[0]["qwire-tenant"] == "t"


def test_constraints(server: FakeServer, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"type": "null"}')
    grammar.write_text('start: "a"')
    given: list[tuple[list[str], gen.Constraint]] = [
        (["--json-schema", str(schema)], gen.Constraint(json_schema='{"type": "null"}')),
        (["--json-schema", ' {"type": "null"}'], gen.Constraint(json_schema=' {"type": "null"}')),
        (["--json-schema", "true"], gen.Constraint(json_schema="true")),
        (["--json-object"], gen.Constraint(json_object=gen.Constraint.JsonObject())),
        (["--regex", "a+", "--free-thinking"], gen.Constraint(regex="a+", free_thinking=True)),
        (["--grammar", str(grammar)], gen.Constraint(grammar='start: "a"')),
        (["--grammar", "start: /b/"], gen.Constraint(grammar="start: /b/")),
        (["--choice", "a", "--choice", "b"], gen.Constraint(choice=gen.Constraint.Choice(texts=["a", "b"]))),
    ]
    for flags, _ in given:
        assert run(server, "generate", "--prompt", "x", *flags).exit_code == 0
    assert [request.constraint for request in server.requests] == [constraint for _, constraint in given]
    for wrong in (["--json-schema", "nowhere.json"], ["--regex", "a", "--choice", "b"]):
        assert run(server, "generate", "--prompt", "x", *wrong).exit_code == 2


def test_chat_and_messages(server: FakeServer, tmp_path: Path) -> None:
    assert run(server, "generate", "--chat", "hi", "--no-enable-thinking").exit_code == 0
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": "ü"}]))
    assert run(server, "generate", "--messages", str(file)).exit_code == 0
    assert run(server, "generate", "--messages", "-", input=file.read_text()).exit_code == 0
    user = tok.Message(role=tok.ROLE_USER, content="hi")
    options = tok.TemplateOptions(enable_thinking=False)
    assert server.requests[0].chat == tok.Chat(messages=[user], template_options=options)
    expected = tok.Chat(messages=[tok.Message(role=tok.ROLE_USER, content="ü")])
    assert [request.chat for request in server.requests[1:]] == [expected, expected]


def test_json(server: FakeServer) -> None:
    result = run(server, "generate", "--prompt", "hi", "--json")
    assert result.exit_code == 0
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [next(iter(line)) for line in lines] == ["accepted", *["delta"] * 4, "finished"]
    assert lines[0]["accepted"]["promptTokens"] == 3
    expected = {"choice": 0, "tokenIndex": "0", "tokenIds": [10], "textOffset": "0", "text": "Hé", "logprobs": []}
    assert lines[1]["delta"] == expected
    assert lines[-1]["finished"]["reason"] == "FINISH_REASON_EOS"


def test_other_choices_follow(server: FakeServer) -> None:
    server.script = [
        accepted(sampling=gen.SamplingParams(n=2)),
        delta(0, [1], 0, "b", choice=1),
        delta(0, [1], 0, "a"),
        finished(1),
        finished(1, choice=1),
    ]
    assert run(server, "generate", "--prompt", "hi", "--n", "2").stdout == "a\n--- choice 1\nb\n"


def test_error_text(server: FakeServer) -> None:
    server.script = [REFUSAL]
    result = run(server, "generate", "--prompt", "hi")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "Error: the request is wrong (INVALID_REQUEST)",
        "  sampling.top_p: must be in (0, 1]; is 2",
        "  stop: too many",
        "  Try again in 1.5 s.",
    ]


def test_error_json(server: FakeServer) -> None:
    server.script = [accepted(), delta(0, [1], 0, "a"), REFUSAL]
    result = run(server, "generate", "--prompt", "hi", "--json")
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 2)
    error = json.loads(result.stderr)
    assert list(error) == ["code", "message", "details"]
    assert (error["code"], error["message"]) == ("INVALID_ARGUMENT", "the request is wrong")
    details = {detail["@type"].rpartition(".")[2]: detail for detail in error["details"]}
    assert details["ErrorInfo"]["reason"] == "INVALID_REQUEST"
    assert details["BadRequest"]["fieldViolations"][1] == {"field": "stop", "description": "too many"}
    assert details["RetryInfo"]["retryDelay"] == "1.500s"


@pytest.mark.parametrize(
    "args",
    [
        ["generate"],
        ["generate", "--prompt", "a", "--chat", "b"],
        ["generate", "--token-ids", "1,x"],
        ["generate", "--token-ids", "4294967296"],
        ["generate", "--prompt", "a", "--timeout", "0"],
        ["generate", "--prompt", "a", "--enable-thinking"],
        ["generate", "--messages", "/nonexistent"],
        ["generate", "--prompt", "a", "--seed", "-1"],
        ["generate", "--prompt", "a", "--nonsense"],
    ],
)
def test_usage_errors(server: FakeServer, args: list[str]) -> None:
    result = run(server, *args)
    assert (result.exit_code, server.requests) == (2, [])
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("text", ["{", '[{"role": "nobody"}]', '{"role": "user"}', "[3]"])
def test_messages_that_make_no_chat(server: FakeServer, text: str) -> None:
    assert run(server, "generate", "--messages", "-", input=text).exit_code == 2


def test_models(server: FakeServer) -> None:
    assert run(server, "models").stdout == "demo: LlamaForCausalLM, context 2048, float32\n"
    (line,) = run(server, "models", "--json").stdout.splitlines()
    assert json.loads(line)["contextLength"] == 2048


def test_chat_keeps_the_conversation(server: FakeServer) -> None:
    result = run(
        server, "chat", "--system", "be brief", "--max-tokens", "9", input="one\n\ntwo\n/reset\nthree\n/exit\n"
    )
    assert result.exit_code == 0
    assert result.stdout == "Héllo!\n" * 3
    turns = [[message.content for message in request.chat.messages] for request in server.requests]
    assert turns == [["be brief", "one"], ["be brief", "one", "Héllo!", "two"], ["be brief", "three"]]
    assert [request.stop.max_tokens for request in server.requests] == [9] * 3


def test_chat_survives_an_error(server: FakeServer) -> None:
    server.script = [REFUSAL]
    result = run(server, "chat", input="one\ntwo\n")
    assert result.exit_code == 0
    assert result.stderr.count("the request is wrong") == 2
    assert [len(request.chat.messages) for request in server.requests] == [1, 1]


# Whoever runs the tests in the background has SIGINT ignored, and children inherit that. Not by a preexec_fn: it takes
# a fork, whose child gRPC aborts now and then where this process has threads of it.
INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("qwire", run_name="__main__", alter_sys=True)
"""


def start(server: FakeServer, *args: str) -> subprocess.Popen[str]:
    command, *rest = args
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, command, "--address", server.address, *rest],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_cancels_and_exits_130(server: FakeServer) -> None:
    server.script = [accepted(), delta(0, [1], 0, "partial"), Hang()]
    with start(server, "generate", "--prompt", "hi") as process:
        assert process.stdout is not None
        assert process.stdout.read(7) == "partial"  # It streams: the rest never comes.
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "\n", "")
    assert server.ended.wait(5)


def test_ctrl_c_in_a_chat_stops_the_answer_alone(server: FakeServer) -> None:
    server.script = [accepted(), delta(0, [1], 0, "partial"), Hang()]
    with start(server, "chat") as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdin.write("one\n")
        process.stdin.flush()
        assert process.stdout.read(7) == "partial"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == " [stopped]\n"
        server.script = [accepted(), delta(0, [1], 0, "whole"), finished(1)]
        out, _ = process.communicate("two\n", timeout=20)
    assert (process.returncode, out) == (0, "whole\n")
    assert [message.content for message in server.requests[1].chat.messages] == ["one", "partial", "two"]
