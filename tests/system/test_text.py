"""Row 29: whatever bytes a model says, every message is valid UTF-8 and the pieces are the one-shot decoding."""

from __future__ import annotations

import pytest

from qwire import Client


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes(client: Client, seed: int) -> None:
    generation = client.generate(token_ids=[1, 2, 3], max_tokens=400, ignore_eos=True, temperature=3.0, seed=seed)
    pieces = [delta.text for delta in generation]
    assert "".join(pieces) == generation.text == client.decode(generation.token_ids)
    assert "\ufffd" in generation.text


def test_characters_split_across_tokens_are_held_until_whole(client: Client) -> None:
    text = "👩\u200d👩\u200d👧 漢字 \x00 ñ"
    ids = client.encode(text)
    assert len(ids) > len(text)
    assert client.decode(ids) == text
