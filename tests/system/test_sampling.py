"""Choices, penalties, bans and log-probabilities, over real processes."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from qwire import AsyncClient, Client, QwireError, Reason
from qwire.v1 import generation_pb2 as pb
from tests.helpers.stacks import RunningStack, eventually

PROMPT = list(range(60, 93))


def run(client: Client, **options: Any) -> Any:
    return client.generate(**{"token_ids": PROMPT, "max_tokens": 20, "ignore_eos": True, **options}).read()


PENALIZED = {
    "temperature": 0.9,
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.4,
    "presence_penalty": 0.3,
    "logit_bias": {5: 2.0, 7: -100.0},
    "logprobs": 3,
}


def outputs(generation: Any) -> list[tuple[list[int], str, list[bytes]]]:
    return [
        (choice.token_ids, choice.text, [item.SerializeToString() for item in choice.logprobs])
        for choice in generation.choices.values()
    ]


def test_choices_draw_what_they_draw_alone(client: Client) -> None:
    """n = 4 gives, choice by choice, what n = 1 to 4 give: in company, in another order, or by themselves."""
    for options in ({"temperature": 1.0}, PENALIZED):
        four = outputs(run(client, n=4, seed=11, **options))
        assert len({tuple(ids) for ids, _, _ in four}) == 4
        with ThreadPoolExecutor(4) as pool:
            fewer = list(pool.map(lambda n, o=options: outputs(run(client, n=n, seed=11, **o)), (1, 2, 3, 4)))
        assert fewer == [four[:1], four[:2], four[:3], four]
        assert outputs(run(client, n=4, seed=11, bypass=True, **options)) == four


def test_greedy_choices_are_all_the_same_and_cost_one_prompt(client: Client) -> None:
    generation = run(client, n=3, temperature=0, bypass=True)
    assert len(generation.choices) == 3
    assert len({tuple(choice.token_ids) for choice in generation.choices.values()}) == 1
    assert generation.accepted.sampling.n == 3
    usages = {choice.finished.usage.prompt_tokens for choice in generation.choices.values()}
    assert usages == {len(PROMPT)}


def test_a_choice_that_stops_leaves_the_others_alone(client: Client, tiny: RunningStack) -> None:
    whole = run(client, n=3, seed=5, temperature=1.0, max_tokens=60)
    stop = whole.choices[1].text[4:6]
    cut = run(client, n=3, seed=5, temperature=1.0, max_tokens=60, stop=[stop])
    assert cut.choices[1].text == whole.choices[1].text[: whole.choices[1].text.index(stop)]
    assert cut.choices[1].finished.stop_string == stop
    for index in (0, 2):
        text = whole.choices[index].text
        assert cut.choices[index].text == (text[: text.index(stop)] if stop in text else text)
    assert eventually(lambda: tiny.state().blocks_in_use == 0, 10)


def test_biases_bans_and_allow_lists(client: Client) -> None:
    ids = run(client, temperature=0).token_ids
    assert 40 in run(client, temperature=0, logit_bias={40: 100.0}).token_ids[:1]
    assert ids[0] not in run(client, temperature=0, logit_bias={ids[0]: -100.0}).token_ids[:1]
    allowed = run(client, temperature=2.0, allowed_token_ids=[10, 20, 30]).token_ids
    assert set(allowed) <= {10, 20, 30}
    word = "the"
    biased = dict.fromkeys(client.encode(word), 100.0)
    assert word in run(client, temperature=0, logit_bias=biased).text
    assert word not in run(client, temperature=0, logit_bias=biased, bad_words=[word]).text


def test_penalties_drive_tokens_apart(client: Client) -> None:
    plain = run(client, temperature=0, max_tokens=60).token_ids
    spread = run(client, temperature=0, max_tokens=60, presence_penalty=2.0, frequency_penalty=2.0).token_ids
    assert len(set(spread)) > len(set(plain))
    fresh = run(client, temperature=0, max_tokens=60, repetition_penalty=10.0).token_ids
    assert len(set(fresh) - set(PROMPT)) > len(set(plain) - set(PROMPT))


def test_nothing_stops_before_min_tokens(client: Client) -> None:
    (eos,) = client.model().eos_token_ids
    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": False, "logit_bias": {eos: 100.0}}
    assert run(client, **options).token_ids == [eos]
    patient = run(client, **options, min_tokens=5)
    assert len(patient.token_ids) == 6
    assert patient.token_ids[-1] == eos
    assert eos not in patient.token_ids[:-1]
    stopped = run(client, temperature=0, min_tokens=20, stop=[run(client, temperature=0).text[0]])
    assert len(stopped.token_ids) == 20


def test_generate_once_is_the_stream_at_once(client: Client, tiny: RunningStack) -> None:
    options: dict[str, Any] = {
        "token_ids": PROMPT,
        "max_tokens": 15,
        "ignore_eos": True,
        "seed": 3,
        "n": 2,
        "logprobs": 1,
    }
    stream = client.generate(**options).read()
    once = client.generate_once(**options)
    assert [(list(c.token_ids), c.text) for c in once.choices] == [
        (c.token_ids, c.text) for c in stream.choices.values()
    ]
    assert [list(c.logprobs) for c in once.choices] == [c.logprobs for c in stream.choices.values()]
    assert once.accepted.sampling.n == 2
    assert [c.finished.reason for c in once.choices] == [pb.FINISH_REASON_LENGTH] * 2

    async def by_async() -> pb.GenerateOnceResponse:
        async with AsyncClient(tiny.address) as async_client:
            return await async_client.generate_once(**options)

    assert list(asyncio.run(by_async()).choices[0].token_ids) == stream.token_ids
    with pytest.raises(QwireError) as caught:
        client.generate_once(token_ids=PROMPT, top_p=7)
    assert caught.value.violations[0].field == "request.sampling.top_p"


def test_logprobs_of_the_prompt_are_those_of_transformers(client: Client, tiny_model: Path) -> None:
    """Whatever is cached of the prompt, however long it is, and whatever is asked for beside them."""
    from transformers import Qwen3ForCausalLM

    prompt = [(7 * index * index + index // 5) % 250 for index in range(540)]
    plain = run(client, token_ids=prompt, max_tokens=8, temperature=0)
    options: dict[str, Any] = {"token_ids": prompt, "max_tokens": 8, "ignore_eos": True}
    answer = client.generate_once(**options, temperature=0, prompt_logprobs=3)
    assert list(answer.choices[0].token_ids) == plain.token_ids
    assert answer.choices[0].finished.usage.cached_tokens == 0
    model = Qwen3ForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)
    assert [entry.drawn.token_id for entry in answer.prompt_logprobs] == prompt[1:]
    for position, entry in enumerate(answer.prompt_logprobs):
        assert math.isclose(entry.drawn.logprob, expected[position, prompt[position + 1]].item(), abs_tol=1e-3)
        top = expected[position].topk(3)
        assert [item.logprob for item in entry.top] == pytest.approx(top.values.tolist(), abs=1e-3)
        if (top.values.diff().abs() > 2e-3).all():
            assert [item.token_id for item in entry.top] == top.indices.tolist()
    # Before penalties, with other choices, and on the prompt alone.
    several = client.generate_once(
        **options, prompt_logprobs=3, n=3, seed=2, repetition_penalty=1.5, logit_bias={5: 3.0}, logprobs=1
    )
    assert list(several.prompt_logprobs) == list(answer.prompt_logprobs)
    assert len({tuple(choice.token_ids) for choice in several.choices}) == 3
    bare = client.generate_once(**{**options, "token_ids": [3, 4, 5], "prompt_logprobs": 0, "max_tokens": 1})
    assert [(entry.drawn.token_id, len(entry.top)) for entry in bare.prompt_logprobs] == [(4, 0), (5, 0)]
    assert not client.generate_once(**{**options, "token_ids": [3], "prompt_logprobs": 2}).prompt_logprobs
    assert not client.generate_once(**options).prompt_logprobs


def test_a_stream_doesnt_carry_logprobs_of_its_prompt(client: Client) -> None:
    with pytest.raises(QwireError) as caught:
        client.generate_request(pb.GenerateRequest(text="x", output=pb.OutputOptions(prompt_logprobs=1))).read()
    assert caught.value.reason == Reason.INVALID_REQUEST
    assert [violation.field for violation in caught.value.violations] == ["output.prompt_logprobs"]
    with pytest.raises(QwireError) as caught:
        client.generate_once(token_ids=[1] * 4000, prompt_logprobs=20)
    assert [violation.field for violation in caught.value.violations] == ["request.output.prompt_logprobs"]
    assert "65536" in str(caught.value)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.2, "seed": 4, "repetition_penalty": 1.5}])
def test_logprobs_are_those_of_transformers(client: Client, tiny_model: Path, options: dict[str, Any]) -> None:
    from transformers import Qwen3ForCausalLM

    generation = run(client, logprobs=5, **options)
    ids = generation.token_ids
    model = Qwen3ForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.double().log_softmax(-1)
    entries = generation.choices[0].logprobs
    assert len(entries) == len(ids)
    for position, entry in enumerate(entries):
        assert entry.drawn.token_id == ids[position]
        assert math.isclose(entry.drawn.logprob, expected[position, ids[position]].item(), abs_tol=1e-3)
        top = expected[position].topk(5)
        assert [item.logprob for item in entry.top] == pytest.approx(top.values.tolist(), abs=1e-3)
        if (top.values.diff().abs() > 2e-3).all():
            assert [item.token_id for item in entry.top] == top.indices.tolist()
