"""Streams of real processes: the shape of a stream, sampling, stops, and what a stream owes to its neighbours."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwire import Client
from qwire.v1 import generation_pb2 as pb
from tests.helpers.stacks import RunningStack, running_stack

PROMPT = list(range(60, 90))


def greedy(client: Client, prompt: list[int], count: int = 24, **more: object) -> list[int]:
    generation = client.generate(
        token_ids=prompt,
        temperature=0,
        max_tokens=count,
        ignore_eos=True,
        **more,  # type: ignore[arg-type]
    )
    return generation.read().token_ids


def test_the_shape_of_a_stream(client: Client) -> None:
    request = pb.GenerateRequest(
        request_id="shape", text="the thing", stop=pb.StopOptions(max_tokens=9, ignore_eos=True)
    )
    messages = list(client.generate_request(request).responses())
    assert messages[0].HasField("accepted")
    assert all(message.HasField("delta") for message in messages[1:-1])
    accepted, finished = messages[0].accepted, messages[-1].finished
    assert accepted.request_id == "shape"
    assert len(accepted.numerics_id) == 64
    assert accepted.sampling.HasField("seed")
    assert (accepted.sampling.temperature, accepted.sampling.top_p, accepted.stop.max_tokens) == (1, 1, 9)
    ids = [token for message in messages[1:-1] for token in message.delta.token_ids]
    assert len(ids) == finished.usage.generated_tokens == 9
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert finished.usage.prompt_tokens == accepted.prompt_tokens == len(client.encode("the thing"))
    assert finished.placement.worker
    timing = finished.timing
    assert timing.first_token.ToTimedelta() >= timing.queue.ToTimedelta()
    assert timing.decode.ToTimedelta().total_seconds() > 0
    assert client.decode(ids) == "".join(message.delta.text for message in messages[1:-1])


def test_text_ids_and_chat_are_three_ways_to_say_one_prompt(client: Client) -> None:
    text = "<|im_start|>user\nthe rain<|im_end|>\n<|im_start|>assistant\n"
    chat = client.render_chat([{"role": "user", "content": "the rain"}])
    assert list(chat.token_ids) == client.encode(text)
    assert chat.text == text
    by_ids = greedy(client, list(chat.token_ids))
    by_text = client.generate(text, temperature=0, max_tokens=24, ignore_eos=True).read()
    by_chat = client.generate(chat="the rain", temperature=0, max_tokens=24, ignore_eos=True).read()
    assert by_ids == by_text.token_ids == by_chat.token_ids
    assert by_text.text == by_chat.text


def test_what_the_stream_carries_can_be_chosen(client: Client) -> None:
    everything = client.generate(token_ids=PROMPT, temperature=0, max_tokens=8, ignore_eos=True).read()
    no_text = client.generate(token_ids=PROMPT, temperature=0, max_tokens=8, ignore_eos=True, text=False).read()
    no_ids = client.generate(token_ids=PROMPT, temperature=0, max_tokens=8, ignore_eos=True, ids=False).read()
    assert (no_text.token_ids, no_text.text) == (everything.token_ids, "")
    assert (no_ids.token_ids, no_ids.text) == ([], everything.text)


def test_a_seed_fixes_the_tokens(client: Client) -> None:
    def sample(**more: object) -> list[int]:
        options = {"temperature": 1.0, "max_tokens": 30, "ignore_eos": True, **more}
        return client.generate(token_ids=PROMPT, **options).read().token_ids  # type: ignore[arg-type]

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample(request_id="r") == sample(request_id="r") != sample(request_id="s")
    assert sample() != sample()
    assert sample(seed=2**64 - 1) == sample(seed=2**64 - 1)
    assert sample(seed=3, top_k=1) == greedy(client, PROMPT, 30)
    assert sample(seed=3, top_p=1e-6) == greedy(client, PROMPT, 30)
    assert sample(seed=3, min_p=0.999999) == greedy(client, PROMPT, 30)


def test_stop_tokens_and_eos(client: Client, tiny: RunningStack) -> None:
    ids = greedy(client, PROMPT)
    stop = ids[5]
    stopped = client.generate(token_ids=PROMPT, temperature=0, max_tokens=24, stop_token_ids=[stop], ignore_eos=True)
    assert stopped.read().token_ids == ids[: ids.index(stop) + 1]
    assert stopped.finished is not None
    assert stopped.finished.reason == pb.FINISH_REASON_STOP_TOKEN
    assert stopped.finished.stop_token_id == stop
    (eos,) = client.model().eos_token_ids
    for seed in range(40):  # some seed draws EOS soon
        sampled = client.generate(token_ids=PROMPT, temperature=1.5, max_tokens=200, seed=seed).read()
        if sampled.token_ids[-1] == eos:
            break
    assert sampled.finished is not None
    assert (sampled.finished.reason, sampled.finished.stop_token_id) == (pb.FINISH_REASON_EOS, eos)
    assert eos not in sampled.token_ids[:-1]
    assert "<|im_end|>" not in sampled.text


def test_stop_strings_cut_the_text_and_the_ids(client: Client) -> None:
    whole = client.generate(token_ids=PROMPT, temperature=0, max_tokens=60, ignore_eos=True).read()
    stop = whole.text[10:13]
    end = whole.text.index(stop)
    cut = client.generate(token_ids=PROMPT, temperature=0, max_tokens=60, ignore_eos=True, stop=[stop]).read()
    assert cut.text == whole.text[:end]
    assert cut.finished is not None
    assert (cut.finished.reason, cut.finished.stop_string) == (pb.FINISH_REASON_STOP_STRING, stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert cut.finished.usage.generated_tokens == len(cut.token_ids)
    assert stop in client.decode(cut.token_ids)
    assert stop not in client.decode(cut.token_ids[:-1])
    kept = client.generate(
        token_ids=PROMPT, temperature=0, max_tokens=60, ignore_eos=True, stop=[stop], include_stop=True
    ).read()
    assert kept.text == whole.text[: end + len(stop)]


def test_sixteen_streams_share_a_prefix_and_give_what_each_gives_alone(client: Client) -> None:
    shared = [(7 * i) % 250 for i in range(600)]
    prompts = [[*shared, 100 + number, 3, number] for number in range(16)]
    alone = [greedy(client, prompt, bypass=True) for prompt in prompts]
    greedy(client, [*shared, 1])  # the warm-up

    def run(prompt: list[int]) -> tuple[list[int], int]:
        generation = client.generate(token_ids=prompt, temperature=0, max_tokens=24, ignore_eos=True).read()
        assert generation.finished is not None
        return generation.token_ids, generation.finished.usage.cached_tokens

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(run, prompts))
    assert [ids for ids, _ in together] == alone
    assert all(cached == 600 for _, cached in together)


def test_cached_prefixes_stay_within_their_scope(client: Client) -> None:
    prompt = [(11 * i) % 250 for i in range(100)]

    def cached(**more: object) -> int:
        generation = client.generate(token_ids=prompt, max_tokens=1, **more).read()  # type: ignore[arg-type]
        assert generation.finished is not None
        return generation.finished.usage.cached_tokens

    assert [cached(scope="a"), cached(scope="a"), cached(scope="b"), cached(), cached(bypass=True)] == [0, 96, 0, 0, 0]


def test_cached_prefixes_and_request_ids_are_each_tenants_own(tiny: RunningStack) -> None:
    prompt = [(13 * i) % 250 for i in range(100)]
    tenants = [Client(tiny.address, metadata=[("qwire-tenant", name)] if name else ()) for name in ("a", "b", "")]
    with tenants[0], tenants[1], tenants[2]:
        for expected in (0, 96):
            running = [
                client.generate(token_ids=prompt, max_tokens=4, seed=1, request_id="same", priority=priority)
                for client, priority in zip(tenants, (-10, 0, 10), strict=True)
            ]
            for generation in running:
                generation.read()
            assert len({tuple(generation.token_ids) for generation in running}) == 1
            cached = [generation.finished.usage.cached_tokens for generation in running if generation.finished]
            assert cached == [expected] * 3


def test_out_of_blocks_nothing_is_lost(tiny_model: Path, client: Client) -> None:
    prompts = [[number, *PROMPT] for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        expected = list(pool.map(lambda prompt: greedy(client, prompt, 60), prompts))
        with (
            running_stack(tiny_model, "tiny", worker_flags=("--kv-blocks", "64")) as small,
            small.client() as cramped,
        ):
            assert list(pool.map(lambda prompt: greedy(cramped, prompt, 60), prompts)) == expected
            assert small.state().preemptions > 0
            assert small.state().blocks_in_use == 0


@pytest.mark.parametrize("ending", ["context", "tokens"])
def test_max_tokens_unset_means_what_is_left(client: Client, ending: str) -> None:
    length = client.model().context_length
    prompt = [5] * (length - 3)
    if ending == "context":
        assert len(client.generate(token_ids=prompt, ignore_eos=True).read().token_ids) == 3
    else:
        generation = client.generate(token_ids=prompt, max_tokens=2, ignore_eos=True).read()
        assert len(generation.token_ids) == 2
