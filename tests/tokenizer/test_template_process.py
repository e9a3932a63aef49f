"""Hostile templates are refused or bounded, and the helper process comes back and goes away."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.tokenizers import tiny_tokenizer_json
from tokenizer_svc.chat import ChatRenderer
from tokenizer_svc.codec import Codec
from tokenizer_svc.errors import ChatError, ChatFailure, TokenizerLoadError
from tokenizer_svc.template_client import ChatLimits

CODEC = Codec(json.dumps(tiny_tokenizer_json()).encode(), {})
USER = [{"role": "user", "content": "hi"}]
ROOT = Path(__file__).resolve().parents[2]
LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
ON_REQUEST = "{% if bad %}" + LOOP + "{% endif %}fine"


def renderer_of(template: str, **limits: float) -> ChatRenderer:
    return ChatRenderer(CODEC, {"default": template}, ChatLimits(**limits))  # type: ignore[arg-type]


def pid_of(renderer: ChatRenderer) -> int:
    assert renderer._helper is not None
    return renderer._helper._process.pid


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


async def failure_of(renderer: ChatRenderer, **options: object) -> ChatFailure:
    with pytest.raises(ChatError) as caught:
        await renderer.render(USER, **options)  # type: ignore[arg-type]
    return caught.value.failure


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ nonsense | no_such_filter }}",
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ '' | attr('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{% set x = ().__class__.__base__ %}",
        "{{ 9 ** (9 ** 9) }}",  # folded while compiling
    ],
)
async def test_refused_at_load(template: str) -> None:
    renderer = renderer_of(template, start_seconds=3)
    with pytest.raises(ChatError) as caught:
        await renderer.start()
    assert caught.value.failure is ChatFailure.TEMPLATE_REFUSED
    await renderer.aclose()


@pytest.mark.parametrize(
    ("template", "failure"),
    [
        ("{{ ''['__cla' ~ 'ss__'].mro() }}", ChatFailure.TEMPLATE_REFUSED),
        ("{{ ('' | attr('_' ~ '_class_' ~ '_')).mro() }}", ChatFailure.TEMPLATE_REFUSED),
        ("{{ (raise_exception | attr('_' ~ '_globals_' ~ '_'))['os'] }}", ChatFailure.TEMPLATE_REFUSED),
        ("{{ messages.append(1) }}", ChatFailure.TEMPLATE_REFUSED),
        ("{{ namespace(**{'_' ~ 'x': 1}) }}", ChatFailure.TEMPLATE_REFUSED),
        ("{{ raise_exception('no such chat') }}", ChatFailure.TEMPLATE_RAISED),
        ("{{ 1 + 'x' }}{{ messages[0].nothing.at.all }}", ChatFailure.TEMPLATE_FAILED),
        ("{{ range(10 ** 9) | list }}", ChatFailure.TEMPLATE_FAILED),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ChatFailure.TEMPLATE_FAILED),
        (LOOP, ChatFailure.TIME_LIMIT),
        ("{{ (9 * (messages | length)) ** (9 ** 9) }}", ChatFailure.TIME_LIMIT),
        ("{{ 'x' * 10 ** 11 }}", ChatFailure.MEMORY_LIMIT),
        ("{{ 'x' * (messages | length * 1073741824) }}", ChatFailure.MEMORY_LIMIT),
        ("{% for i in range(90000) %}{{ 'x' * (messages | length * 100) }}{% endfor %}", ChatFailure.OUTPUT_LIMIT),
    ],
)
async def test_bounded_at_render(template: str, failure: ChatFailure) -> None:
    renderer = renderer_of("{% if bad %}" + template + "{% else %}fine{% endif %}", render_seconds=1.0)
    async with renderer:
        began = time.monotonic()
        assert await failure_of(renderer, extra={"bad": True}) is failure
        assert time.monotonic() - began < 5
        assert (await renderer.render(USER))[0].text == "fine"  # the next render works


async def test_an_escape_that_is_only_printed_shows_nothing() -> None:
    template = "a{{ ''['__cla' ~ 'ss__'] }}b{{ ('{0._' ~ '_class_' ~ '_}').format(messages) }}c"
    async with renderer_of(template) as renderer:
        assert (await renderer.render(USER))[0].text == "abc"


async def test_what_a_template_says_is_told_apart() -> None:
    async with renderer_of("{{ raise_exception('Roles must alternate! ' ~ messages[0].content * 1000) }}") as renderer:
        with pytest.raises(ChatError) as caught:
            await renderer.render(USER)
    assert caught.value.detail.startswith("Roles must alternate! hihi")
    assert len(caught.value.detail) == 512
    assert "hihi" not in str(caught.value)


async def test_template_that_is_too_long() -> None:
    with pytest.raises(TokenizerLoadError):
        renderer_of("x" * 2000, template_bytes=1000)


async def test_a_dead_helper_is_replaced() -> None:
    async with renderer_of("fine") as renderer:
        for _ in range(3):
            os.kill(pid_of(renderer), signal.SIGKILL)
            assert (await renderer.render(USER))[0].text == "fine"


async def test_started_at_the_first_render_and_closed() -> None:
    renderer = renderer_of("fine")
    await renderer.render(USER)
    pid = pid_of(renderer)
    assert running(pid)
    await renderer.aclose()
    assert not running(pid)
    assert await failure_of(renderer) is ChatFailure.CLOSED


async def test_close_ends_a_running_render() -> None:
    renderer = renderer_of(LOOP, render_seconds=30)
    render = asyncio.ensure_future(failure_of(renderer))
    await asyncio.sleep(0.6)
    await renderer.aclose()
    assert await render is ChatFailure.CLOSED


async def test_the_queue_is_bounded() -> None:
    async with renderer_of(ON_REQUEST, max_waiting=2) as renderer:
        renders = [asyncio.ensure_future(renderer.render(USER)) for _ in range(5)]
        results = await asyncio.gather(*renders, return_exceptions=True)
        busy = [result for result in results if isinstance(result, ChatError)]
        assert [error.failure for error in busy] == [ChatFailure.BUSY] * 2
        assert (await renderer.render(USER))[0].text == "fine"


async def test_a_caller_who_gives_up_does_not_disturb_the_next() -> None:
    async with renderer_of(ON_REQUEST + "{{ messages[0].content }}", render_seconds=1.0) as renderer:
        for index in range(20):
            first = asyncio.ensure_future(renderer.render([{"role": "user", "content": "first"}]))
            waiting = asyncio.ensure_future(renderer.render([{"role": "user", "content": "waiting"}]))
            for _ in range(index % 4):
                await asyncio.sleep(0)
            first.cancel()
            waiting.cancel()
            assert (await renderer.render(USER))[0].text == "finehi"
        assert renderer._waiting == 0


PARENT = """
import asyncio, json, sys
from tests.tokenizer.test_template_process import LOOP, USER, renderer_of, pid_of
async def main():
    renderer = renderer_of("{% if bad %}" + LOOP + "{% endif %}", render_seconds=60)
    await renderer.start()
    print(pid_of(renderer), flush=True)
    await renderer.render(USER, extra={"bad": sys.argv[1] == "loop"})
    print("rendered", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["loop", "idle"])
async def test_no_orphan_when_the_parent_is_killed(state: str) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, state, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    if state == "loop":
        await asyncio.sleep(0.3)
    else:
        assert await parent.stdout.readline() == b"rendered\n"
    assert running(pid)
    parent.kill()
    await parent.wait()
    for _ in range(100):
        if not running(pid):
            break
        await asyncio.sleep(0.05)
    assert not running(pid)


async def test_the_helper_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWIRE_TEST_SECRET", "s3cret")
    async with renderer_of("fine") as renderer:
        assert b"s3cret" not in environment_of(pid_of(renderer))
