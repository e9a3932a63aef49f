"""The demo model's text over gRPC is what transformers gives when it reads the GGUF itself, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.stacks import RunningStack

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 2+2?",
    "Translate 'good morning' into French.",
    "Name three colors.",
]
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def oracle(demo_gguf: Path) -> tuple[Any, Any]:
    """transformers' model and tokenizer out of the GGUF."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # What from_pretrained(gguf_file=…) does, which would want accelerate installed.
    config = AutoConfig.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = load_gguf_checkpoint(str(demo_gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_greedy_text_is_that_of_transformers(demo: RunningStack, oracle: tuple[Any, Any]) -> None:
    model, tokenizer = oracle
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with demo.client() as client:
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            given = torch.tensor([prompt])
            with torch.inference_mode():
                made = model.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=MAX_TOKENS,
                    do_sample=False,
                    eos_token_id=eos,
                    pad_token_id=eos,
                )
            expected = tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)
            assert list(client.render_chat(messages).token_ids) == prompt
            generation = client.generate(chat=question, temperature=0, max_tokens=MAX_TOKENS).read()
            assert generation.text == expected
            assert generation.token_ids == made[0, len(prompt) :].tolist()
        assert "Paris" in client.generate(chat=QUESTIONS[0], temperature=0, max_tokens=MAX_TOKENS).read().text
