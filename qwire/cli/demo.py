"""`qwire demo`: everything once, from nothing to an answer."""

from __future__ import annotations

import asyncio
import sys
import time

import click

from qwire import hub
from qwire.aio_client import AsyncClient, AsyncGeneration
from qwire.cli._output import EXIT_INTERRUPTED, reported_errors, write
from qwire.stack import Stack, StackConfig, StackError


@click.command()
@click.option("--prompt", default="What is the capital of France?", metavar="TEXT", help="What to ask.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, help="Longest answer.")
@click.option("--dtype", default="float32", metavar="NAME", help="What weights are kept in.")
@click.option("--quantize", default="none", metavar="FORMAT", help="What weights are quantized to: none, int8 or int4.")
@click.option("--verbose", is_flag=True, help="Show what the services log.")
def demo(prompt: str, max_tokens: int, dtype: str, quantize: str, verbose: bool) -> None:
    """Starts everything with a small model, asks it one question, and stops."""
    try:
        config = StackConfig(
            model=hub.resolve(hub.DEMO, sys.stderr),
            served_model_name=hub.DEMO,
            listen="127.0.0.1:0",
            worker_flags=("--dtype", dtype, "--quantize", quantize),
        )
        with reported_errors():
            asyncio.run(run(config, prompt, max_tokens, verbose=verbose))
    except (hub.HubError, StackError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


async def run(config: StackConfig, prompt: str, max_tokens: int, *, verbose: bool = False) -> None:
    """Starts the services, prints the answer and its numbers, and stops the services.

    Raises:
        QwireError, StackError: the request failed, or the services can't run.
    """

    def log(line: str) -> None:
        if verbose:
            click.echo(line, err=True)

    click.echo("starting the services", err=True)
    async with Stack(config, log=log) as stack, AsyncClient(stack.address) as client:
        started = time.monotonic()
        first_text: float | None = None
        async with client.generate(chat=prompt, temperature=0, max_tokens=max_tokens) as generation:
            async for delta in generation:
                if first_text is None:
                    first_text = time.monotonic() - started
                write(delta.text)
        click.echo()
        click.echo(_numbers(generation, first_text))


def _numbers(generation: AsyncGeneration, first_text: float | None) -> str:
    finished = generation.finished
    if finished is None:
        return ""
    usage, decode = finished.usage, finished.timing.decode.ToTimedelta().total_seconds()
    parts = [f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.generated_tokens} generated"]
    if first_text is not None:
        parts.append(f"TTFT {first_text * 1000:.0f} ms")
    if decode > 0:
        # The first token belongs to the prefill.
        parts.append(f"{(usage.generated_tokens - 1) / decode:.1f} tok/s")
    return "; ".join(parts)
