"""`python -m tokenizer_svc serve`: the tokenizer service's process."""

from __future__ import annotations

import logging
import sys

import click

from qwire.service.config import EXIT_UNUSABLE_MODEL, command
from qwire.service.server import Listener, Server, run, until_signal
from qwire.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from tokenizer_svc.chat import ChatRenderer
from tokenizer_svc.codec import Codec
from tokenizer_svc.config import TokenizerConfig
from tokenizer_svc.errors import TokenizerError
from tokenizer_svc.face import TokenizerFace
from tokenizer_svc.template_client import ChatLimits

log = logging.getLogger(__name__)


async def serve(config: TokenizerConfig) -> int:
    """Runs the service until it is told to stop; returns the exit status."""
    listener = Listener(config.listen, config.insecure_bind)
    listener.check()
    limits = ChatLimits(
        render_seconds=config.render_seconds,
        memory_bytes=config.render_mib * 2**20,
        output_bytes=config.render_output_bytes,
        max_waiting=config.max_waiting_renders,
    )
    try:
        codec = Codec.load(config.model)
        chats = ChatRenderer.load(codec, config.model, limits)
        await chats.start()
    except TokenizerError as error:
        log.error("can't serve %s: %s", config.model, error)
        return EXIT_UNUSABLE_MODEL
    server = Server(listener, max_message_bytes=config.max_message_bytes)
    server.add(
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server,
        TokenizerFace(config, codec, chats),
        tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"].full_name,
    )
    try:
        await server.start()
        await server.set_serving(True)
        await until_signal()
        await server.stop(config.grace)
    finally:
        await chats.aclose()
    return 0


@click.group()
def main() -> None:
    """The tokenizer service."""


main.add_command(command(TokenizerConfig, lambda config: run(lambda: serve(config)), service="tokenizer"))

if __name__ == "__main__":
    sys.exit(main(prog_name="python -m tokenizer_svc"))
