"""The rules of the stream: whatever the text, the stop strings and the way ids and reads fall, a client gets what one
look at the whole output says it should."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwire._stream import ChoiceOutput
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import tokenizer_pb2, worker_pb2
from router.choice import OutputSpec
from router.journal import Journal
from tests.helpers.stacks import write_tiny_model
from tokenizer_svc.codec import Codec
from tokenizer_svc.detokenizer import Detokenizer
from tokenizer_svc.face import OpenSequences

LETTERS = st.sampled_from(["a", "b", "the", " ", "é", "漢", "🙂", "\u200d", "\x00", "in", "an"])


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec.load(write_tiny_model(tmp_path_factory.mktemp("rules") / "tiny"))


def oracle(codec: Codec, ids: list[int], stops: list[str], include: bool) -> tuple[str, int, str | None]:
    """Text, number of ids and matched stop string, from the whole output at once: the earliest end wins, of several
    that end there the longest."""
    for count in range(1, len(ids) + 1):
        text = codec.decode(ids[:count]).rstrip("\ufffd")  # what may still become a character matches nothing yet
        ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
        if ends:
            end, _, stop = min(ends)
            return text[: end if include else end - len(stop)], count, stop
    return codec.decode(ids), len(ids), None


def pieces(data: st.DataObject, ids: list[int]) -> Iterator[list[int]]:
    left = list(ids)
    while left:
        size = data.draw(st.integers(1, min(4, len(left))))
        yield left[:size]
        left = left[size:]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    text=st.lists(LETTERS, min_size=1, max_size=30).map("".join),
    stops=st.lists(st.lists(LETTERS, min_size=1, max_size=3).map("".join), max_size=3, unique=True),
    include=st.booleans(),
)
def test_a_stream_is_what_one_look_at_the_output_says(
    codec: Codec, data: st.DataObject, text: str, stops: list[str], include: bool
) -> None:
    ids = codec.encode(text, special_tokens_as_text=True)
    expected_text, expected_ids, expected_stop = oracle(codec, ids, stops, include)

    async def run() -> None:
        spec = OutputSpec(pb.StopOptions(strings=stops, include_stop=include), True, True, 4096)
        journal = Journal(spec, range(1, 2), 1, 0.0, lambda: 0.0)
        service = OpenSequences(Detokenizer(codec), 8)
        messages: list[pb.GenerateResponse] = []

        def tell(requests: list[tokenizer_pb2.DetokenizeRequest]) -> None:
            for request in requests:
                for piece in service.answer(request):
                    journal.take_piece(piece)

        tell(journal.open_requests())
        index = 0
        for part in pieces(data, ids):
            step = worker_pb2.SequenceStep(token_index=index, token_ids=part)
            index += len(part)
            if index == len(ids):
                step.end.reason = worker_pb2.END_REASON_LENGTH
            tell(journal.receive(step))
            if data.draw(st.booleans()):
                messages += journal._take_messages()
            if data.draw(st.integers(0, 9)) == 0 and not journal.choices[0].complete:
                service = OpenSequences(Detokenizer(codec), 8)  # the tokenizer service died and came back
                tell(journal.open_requests())
        messages += journal._take_messages()
        got_text = ""
        got_ids: list[int] = []
        for message in messages[:-1]:
            assert message.delta.token_index == len(got_ids)
            assert message.delta.text_offset == len(got_text.encode())
            got_text += message.delta.text
            got_ids += message.delta.token_ids
        finished = messages[-1].finished
        assert (got_text, got_ids) == (expected_text, ids[:expected_ids])
        assert finished.usage.generated_tokens == expected_ids
        if expected_stop is None:
            assert finished.reason == pb.FINISH_REASON_LENGTH
        else:
            assert (finished.reason, finished.stop_string) == (pb.FINISH_REASON_STOP_STRING, expected_stop)

    asyncio.run(run())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    text=st.lists(LETTERS, min_size=1, max_size=20).map("".join),
    stops=st.lists(st.lists(LETTERS, min_size=1, max_size=3).map("".join), max_size=2, unique=True),
    include=st.booleans(),
    want_ids=st.booleans(),
)
def test_a_stream_that_is_cut_anywhere_and_resumed_is_one_stream(
    codec: Codec, data: st.DataObject, text: str, stops: list[str], include: bool, want_ids: bool
) -> None:
    ids = codec.encode(text, special_tokens_as_text=True)
    expected_text, expected_ids, expected_stop = oracle(codec, ids, stops, include)
    spec = OutputSpec(pb.StopOptions(strings=stops, include_stop=include), True, want_ids, 4096)

    async def run() -> None:
        client = ChoiceOutput()
        cuts = 0
        while client.finished is None:
            journal = Journal(spec, range(1, 2), 1, 0.0, lambda: 0.0)
            service = OpenSequences(Detokenizer(codec), 8)
            held = list(client.token_ids)
            if cuts:
                ended = len(held) == len(ids)
                journal.resume(
                    [pb.ResumeChoice(token_ids=held, text_bytes=client.text_bytes)],
                    [worker_pb2.END_REASON_LENGTH if ended else worker_pb2.END_REASON_UNSPECIFIED],
                )

            def tell(
                requests: list[tokenizer_pb2.DetokenizeRequest],
                journal: Journal = journal,
                service: OpenSequences = service,
            ) -> None:
                for request in requests:
                    for piece in service.answer(request):
                        journal.take_piece(piece)

            def read(journal: Journal = journal) -> None:
                for message in journal._take_messages():
                    if message.HasField("finished"):
                        client.finished = message.finished
                        continue
                    if want_ids:
                        assert message.delta.token_index == len(client.token_ids)
                    assert message.delta.text_offset == client.text_bytes
                    client._append(message.delta)

            tell(journal.open_requests())
            index = len(held)
            steps = list(pieces(data, ids[index:])) if journal.needs_worker else []
            cut = data.draw(st.integers(0, len(steps))) if cuts < 3 else len(steps) + 1
            for part in steps[:cut]:
                step = worker_pb2.SequenceStep(token_index=index, token_ids=part)
                index += len(part)
                if index == len(ids):
                    step.end.reason = worker_pb2.END_REASON_LENGTH
                tell(journal.receive(step))
                if data.draw(st.booleans()):
                    read()
            if cut > len(steps) or data.draw(st.booleans()):
                read()
            cuts += 1
        assert client.text == expected_text
        assert client.token_ids == (ids[:expected_ids] if want_ids else [])
        assert client.finished.usage.generated_tokens == expected_ids
        assert client.finished.stop_string == (expected_stop or "")

    asyncio.run(run())
