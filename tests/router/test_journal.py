"""The journal: each token once, in order, whatever the client's pace and however text and ids arrive."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwire.errors import QwireError, Reason
from qwire.v1 import generation_pb2 as pb
from qwire.v1 import tokenizer_pb2, worker_pb2
from router.choice import IndexGap, OutputSpec
from router.journal import Journal


def journal(
    *, text: bool = True, ids: bool = True, stop: tuple[str, ...] = (), pending: int = 4096, choices: int = 1
) -> Journal:
    spec = OutputSpec(pb.StopOptions(strings=stop, max_tokens=99), text, ids, pending)
    return Journal(spec, range(7, 7 + choices), 3, 0.0, lambda: 1.0)


def step(index: int, ids: list[int], end: worker_pb2.EndReason.ValueType | None = None) -> worker_pb2.SequenceStep:
    message = worker_pb2.SequenceStep(attempt=1, token_index=index, token_ids=ids)
    if end is not None:
        message.end.reason = end
    return message


def piece(consumed: int, text: str, **more: object) -> tokenizer_pb2.DetokenizePiece:
    return tokenizer_pb2.DetokenizePiece(sequence=7, ids_consumed=consumed, text=text, **more)  # type: ignore[arg-type]


async def drain(stream: Journal) -> list[pb.GenerateResponse]:
    messages: list[pb.GenerateResponse] = []
    while not (messages and messages[-1].HasField("finished")):
        messages += await asyncio.wait_for(stream.next_messages(), 1)
    return messages


async def test_ids_alone_need_no_detokenizer() -> None:
    stream = journal(text=False)
    assert stream.receive(step(0, [5])) == []
    assert stream.receive(step(1, [6], worker_pb2.END_REASON_LENGTH)) == []
    first, last = await drain(stream)
    assert list(first.delta.token_ids) == [5, 6]
    assert (first.delta.text, last.finished.reason) == ("", pb.FINISH_REASON_LENGTH)
    assert last.finished.usage.generated_tokens == 2


async def test_logprobs_of_the_prompt_come_whole_or_anew() -> None:
    def part(first: int, *tokens: int) -> worker_pb2.PromptLogprobs:
        entries = [pb.TokenLogprobs(drawn=pb.TokenLogprob(token_id=token)) for token in tokens]
        return worker_pb2.PromptLogprobs(attempt=1, first=first, logprobs=entries)

    stream = journal()
    stream.submitted("w")
    stream.take_prompt_logprobs(part(0, 8))
    stream.submitted("another")
    assert stream.prompt_logprobs == []
    with pytest.raises(IndexGap):
        stream.take_prompt_logprobs(part(1, 9))
    stream.take_prompt_logprobs(part(0, 8, 9))
    assert stream.prompt_scored
    stream.submitted("a third")
    assert [entry.drawn.token_id for entry in stream.prompt_logprobs] == [8, 9]


async def test_the_finish_waits_for_the_text() -> None:
    stream = journal()
    (push,) = stream.receive(step(0, [5]))
    assert (push.push.sequence, push.push.first_index, list(push.push.ids)) == (7, 0, [5])
    push, close = stream.receive(step(1, [2], worker_pb2.END_REASON_EOS))
    assert list(push.push.ids) == [2]
    assert close.HasField("close")
    stream.take_piece(piece(1, "he"))
    stream.take_piece(piece(2, "l"))
    stream.take_piece(piece(2, "lo", final=True))
    delta, finished = await drain(stream)
    assert (delta.delta.text, list(delta.delta.token_ids)) == ("hello", [5, 2])
    assert (finished.finished.reason, finished.finished.stop_token_id) == (pb.FINISH_REASON_EOS, 2)


async def test_a_stop_string_ends_it_where_the_detokenizer_says() -> None:
    stream = journal(stop=("x",))
    stream.receive(step(0, [5, 6, 7]))
    stream.take_piece(piece(2, "ab", match="x"))
    stream.receive(step(3, [8]))
    stream.take_piece(piece(4, "never"))
    delta, finished = await drain(stream)
    assert (delta.delta.text, list(delta.delta.token_ids)) == ("ab", [5, 6])
    assert finished.finished.reason == pb.FINISH_REASON_STOP_STRING
    assert (finished.finished.stop_string, finished.finished.usage.generated_tokens) == ("x", 2)
    assert not stream.ended_at_worker


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=3), st.text(max_size=3), st.booleans())))
def test_deltas_concatenate_to_the_output_at_any_pace(parts: list[tuple[list[int], str, bool]]) -> None:
    async def run() -> None:
        stream = journal()
        sent_ids: list[int] = []
        sent_text = ""
        messages: list[pb.GenerateResponse] = []
        for ids, text, read in parts:
            stream.receive(step(len(sent_ids), ids))
            sent_ids += ids
            sent_text += text
            stream.take_piece(piece(len(sent_ids), text))
            if read:
                messages += await stream.next_messages()
        stream.receive(step(len(sent_ids), [1], worker_pb2.END_REASON_LENGTH))
        stream.take_piece(piece(len(sent_ids) + 1, ""))
        stream.take_piece(piece(len(sent_ids) + 1, "!", final=True))
        messages += await drain(stream)
        got_ids: list[int] = []
        got_text = ""
        for message in messages[:-1]:
            assert message.delta.token_index == len(got_ids)
            assert message.delta.text_offset == len(got_text.encode())
            got_ids += message.delta.token_ids
            got_text += message.delta.text
        assert (got_ids, got_text) == ([*sent_ids, 1], sent_text + "!")

    asyncio.run(run())


async def test_a_gap_in_the_indexes_is_noticed() -> None:
    stream = journal()
    stream.receive(step(0, [1]))
    with pytest.raises(IndexGap):
        stream.receive(step(2, [3]))


async def test_what_was_delivered_comes_before_the_error() -> None:
    stream = journal(text=False)
    stream.receive(step(0, [1]))
    stream.fail(QwireError(grpc.StatusCode.UNAVAILABLE, "gone", reason=Reason.WORKER_LOST))
    (delta,) = await stream.next_messages()
    assert list(delta.delta.token_ids) == [1]
    with pytest.raises(QwireError) as caught:
        await stream.next_messages()
    assert caught.value.reason == Reason.WORKER_LOST


async def test_a_reader_that_never_reads_is_cut_off() -> None:
    stream = journal(text=False, pending=10)
    for index in range(11):
        stream.receive(step(index, [1]))
    await stream.next_messages()
    with pytest.raises(QwireError) as caught:
        await stream.next_messages()
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.SLOW_READER)


async def test_reopening_goes_on_where_the_text_stands() -> None:
    stream = journal(stop=("zz",))
    stream.receive(step(0, [5, 6]))
    stream.take_piece(piece(1, "a"))
    stream.receive(step(2, [7], worker_pb2.END_REASON_LENGTH))
    opening, push, close = stream.open_requests()
    assert list(opening.open.start_ids) == [5]
    assert list(opening.open.stop_strings) == ["zz"]
    assert (push.push.first_index, list(push.push.ids)) == (1, [6, 7])
    assert close.HasField("close")


async def test_steps_that_come_after_the_end_are_no_gap_however_many() -> None:
    stream = journal(stop=("x",))
    stream.receive(step(0, [5]))
    stream.take_piece(piece(1, "a", match="x"))
    for index in range(1, 5):
        assert stream.receive(step(index, [6])) == []
    delta, finished = await drain(stream)
    assert (delta.delta.text, finished.finished.usage.generated_tokens) == ("a", 1)


async def test_many_ids_at_once_are_not_the_readers_fault() -> None:
    stream = journal(pending=10)
    stream.receive(step(0, list(range(20))))
    stream.take_piece(piece(20, "text"))  # the tokenizer service was away and is back
    (delta,) = await stream.next_messages()
    assert len(delta.delta.token_ids) == 20
    stream.receive(step(20, [1], worker_pb2.END_REASON_LENGTH))
    stream.take_piece(piece(21, "!", final=True))
    assert (await drain(stream))[-1].finished.usage.generated_tokens == 21
