"""Between the link's frames and the engine's own types."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator, Sequence

from google.protobuf.duration_pb2 import Duration

from qwire.ordering import MAX_PRIORITY, MIN_PRIORITY
from qwire.prefix import HASH_BYTES
from qwire.v1 import generation_pb2
from qwire.v1 import worker_pb2 as pb
from worker.engine.engine import LoadReport, SequenceReport
from worker.engine.plan import NO_TOKEN, Drawn, SamplingParams
from worker.engine.sequence import EndReason, Request

MAX_CHOICES = 64
LOGPROBS_PER_FRAME = 16_384
"""At 13 bytes each at most."""
MAX_TENANT_BYTES = 32

END_REASONS = {
    EndReason.EOS: pb.END_REASON_EOS,
    EndReason.STOP_TOKEN: pb.END_REASON_STOP_TOKEN,
    EndReason.LENGTH: pb.END_REASON_LENGTH,
    EndReason.CONSTRAINT: pb.END_REASON_CONSTRAINT,
    EndReason.DEAD_END: pb.END_REASON_DEAD_END,
}


def valid(submit: pb.Submit, vocab_size: int) -> bool:
    """Whether a submit is in the ranges that routers hold their requests to. Others could fail a whole step."""
    params = submit.params
    generated = [choice.generated_ids for choice in submit.choices if not choice.ended]
    return bool(
        len(submit.prompt_ids) > 0
        and max(submit.prompt_ids) < vocab_size
        and generated
        and len(submit.choices) <= MAX_CHOICES
        and all(len(ids) < params.max_tokens and max(ids, default=0) < vocab_size for ids in generated)
        and params.max_tokens >= 1
        and MIN_PRIORITY <= submit.priority <= MAX_PRIORITY
        and len(submit.tenant) <= MAX_TENANT_BYTES
        and (submit.bypass_prefix_cache or len(submit.prefix_root) == HASH_BYTES)
        and 0 <= params.temperature < math.inf
        and 0 < params.top_p <= 1
        and 0 <= params.min_p < 1
        and 0 < params.repetition_penalty < math.inf
        and all(map(math.isfinite, (params.frequency_penalty, params.presence_penalty, *params.logit_bias.values())))
        and max((*params.logit_bias, *params.allowed_token_ids), default=0) < vocab_size
        and all(word.ids and max(word.ids) < vocab_size for word in params.bad_words)
        and submit.prompt_logprobs <= vocab_size
    )


def engine_request(submit: pb.Submit, key: Hashable) -> Request:
    """What the engine is asked for a valid submit; its deadline is anchored to the monotonic clock now."""
    params = submit.params
    return Request(
        key=key,
        prompt_ids=list(submit.prompt_ids),
        choices=[list(choice.generated_ids) for choice in submit.choices],
        sampling=_sampling(params),
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        bad_words=[list(word.ids) for word in params.bad_words],
        eos_ids=frozenset(params.eos_token_ids),
        stop_ids=frozenset(params.stop_token_ids),
        prefix_root=submit.prefix_root,
        use_prefix_cache=not submit.bypass_prefix_cache,
        deadline=time.monotonic() + submit.remaining_ms / 1000 if submit.HasField("remaining_ms") else math.inf,
        ended=frozenset(index for index, choice in enumerate(submit.choices) if choice.ended),
        waited=submit.waited_ms / 1000,
        moved=submit.moved,
        suspect=submit.suspect,
        tenant=submit.tenant,
        priority=submit.priority,
        prompt_logprobs=submit.prompt_logprobs if submit.HasField("prompt_logprobs") else None,
    )


def _sampling(params: pb.ResolvedParams) -> SamplingParams:
    return SamplingParams(
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.seed,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
        dict(params.logit_bias),
        tuple(params.allowed_token_ids),
        params.logprobs if params.HasField("logprobs") else None,
    )


def load_frame(load: LoadReport, submits_seen: int) -> pb.Load:
    """The engine's counts, and how many of the router's submits they cover."""
    return pb.Load(
        running=load.running,
        waiting=load.waiting,
        waiting_prefill_tokens=load.waiting_prefill_tokens,
        blocks_in_use=load.blocks_in_use,
        blocks_cached=load.blocks_cached,
        blocks_free=load.blocks_free,
        submits_seen=submits_seen,
        preemptions=load.preemptions,
        drafted_tokens=load.drafted_tokens,
        accepted_tokens=load.accepted_tokens,
        prompt_tokens=load.prompt_tokens,
        cached_tokens=load.cached_tokens,
        evictions=load.evictions,
        prefill_tokens_per_second=load.prefill_tokens_per_second,
    )


def add_report(frame: pb.Step, attempt: int, report: SequenceReport) -> None:
    """Adds to a frame what a step brought to a sequence; one token after another, if it brought several."""
    drawn = report.drawn
    step = frame.sequences[-1] if frame.sequences else None
    if step is None or (step.attempt, step.choice) != (attempt, report.choice):
        step = frame.sequences.add(attempt=attempt, choice=report.choice, token_index=report.token_index)
    if drawn.token_id != NO_TOKEN:
        step.token_ids.append(drawn.token_id)
    if drawn.logprob is not None:
        step.logprobs.append(_token_logprobs(drawn))
    if report.start is not None:
        step.start.CopyFrom(
            pb.SequenceStart(
                cached_tokens=report.start.cached_tokens,
                queue=_duration(report.start.queue_seconds),
                prefill=_duration(report.start.prefill_seconds),
            )
        )
    if report.end is not None:
        step.end.reason = END_REASONS[report.end]


def prompt_logprob_frames(attempt: int, scores: Sequence[Drawn]) -> Iterator[pb.ServeResponse]:
    """What is to be said of a prompt, in frames that stay far below a message's limit."""
    size = max(1, LOGPROBS_PER_FRAME // (1 + len(scores[0].top))) if scores else 1
    for first in range(0, len(scores), size):
        logprobs = [_token_logprobs(score) for score in scores[first : first + size]]
        yield pb.ServeResponse(prompt_logprobs=pb.PromptLogprobs(attempt=attempt, first=first, logprobs=logprobs))


def _token_logprobs(drawn: Drawn) -> generation_pb2.TokenLogprobs:
    return generation_pb2.TokenLogprobs(
        drawn=generation_pb2.TokenLogprob(token_id=drawn.token_id, logprob=drawn.logprob or 0.0),
        top=[generation_pb2.TokenLogprob(token_id=token, logprob=value) for token, value in drawn.top],
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(0, round(seconds * 1e9)))
    return duration
