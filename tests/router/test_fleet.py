"""Where a fleet places requests, what they count there, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import grpc
import pytest

from qwire import prefix
from qwire.errors import QwireError, Reason
from qwire.v1 import generation_pb2, models_pb2
from qwire.v1 import worker_pb2 as pb
from router import fleet
from router.admission import Wanted
from router.block_index import BlockIndex
from router.cache_index import CacheIndex
from router.choice import OutputSpec
from router.fleet import AllFull, Fleet
from router.journal import Journal
from router.placement import POLICIES
from router.worker_link import WorkerLink

BLOCK = 16
PROMPT = list(range(100))
SCOPE = b"s" * 16


def make_link(
    number: int,
    *,
    model: str = "m",
    fingerprint: bytes = b"f",
    running: int = 2,
    waiting: int = 1,
    cache: CacheIndex | None = None,
) -> WorkerLink:
    link = WorkerLink(f"target-{number}", "r", lambda requests: None, cache)
    link.info = pb.WorkerInfo(
        worker_id=f"w{number}",
        model=models_pb2.ModelInfo(name=model),
        block_size=BLOCK,
        kv_dtype="float32",
        model_fingerprint=fingerprint,
        max_running=running,
        max_waiting=waiting,
    )
    link.ready = True
    return link


def make_fleet(*links: WorkerLink, policy: str = "prefix", wait: float = 0.0) -> Fleet:
    return Fleet(list(links), wait, POLICIES[policy])


def hold(link: WorkerLink, ids: list[int], scope: bytes = SCOPE) -> None:
    """Has the router believe that a worker's cache holds the blocks of some ids."""
    assert link.info is not None
    root = prefix.root(link.info.model_fingerprint, "float32", BLOCK, "", scope)
    stored = b"".join(prefix.block_hashes(root, ids, BLOCK))
    link.cache.take(pb.WatchCacheResponse(stored=stored, snapshot=True, snapshot_end=True))


def journal() -> Journal:
    spec = OutputSpec(generation_pb2.StopOptions(max_tokens=99), False, True, 4096)
    return Journal(spec, range(1), 3, 0.0, lambda: 1.0)


async def put(fleet: Fleet, prompt: list[int] = PROMPT, *, bypass: bool = False) -> tuple[WorkerLink, int]:
    place = await fleet.place("m", prompt, SCOPE, bypass=bypass)
    return place.link, place.link.submit(journal(), pb.Submit(), place.uncached_tokens)


async def test_a_request_goes_where_its_prefix_is_and_counts_the_rest() -> None:
    empty, holder = make_link(0), make_link(1)
    hold(holder, PROMPT)
    place = await make_fleet(empty, holder).place("m", [*PROMPT, 7], SCOPE)
    assert (place.link, place.uncached_tokens) == (holder, 101 - 96)
    # The last token is always computed, so its block isn't a hit.
    place = await make_fleet(empty, holder).place("m", PROMPT[:96], SCOPE)
    assert (place.link, place.uncached_tokens) == (holder, 96 - 80)


async def test_what_may_not_be_shared_counts_as_not_there() -> None:
    empty, holder = make_link(0), make_link(1)
    hold(holder, PROMPT)
    for place in (
        await make_fleet(empty, holder).place("m", PROMPT, b"another scope...", bypass=False),
        await make_fleet(empty, holder).place("m", PROMPT, SCOPE, bypass=True),
    ):
        assert (place.link, place.uncached_tokens) == (empty, 100)


async def test_a_request_goes_only_where_all_it_needs_is() -> None:
    needs = frozenset({pb.FEATURE_CONSTRAINTS})
    plain, able = make_link(0), make_link(1)
    assert able.info is not None
    able.info.features.append(pb.FEATURE_CONSTRAINTS)
    hold(plain, PROMPT)
    fleet = make_fleet(plain, able)
    assert (await fleet.place("m", PROMPT, SCOPE)).link is plain
    assert (await fleet.place("m", PROMPT, SCOPE, needs=needs)).link is able
    with pytest.raises(QwireError) as caught:
        await make_fleet(plain).place("m", PROMPT, SCOPE, needs=needs)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNIMPLEMENTED, Reason.NOT_IN_THIS_RELEASE)
    assert "FEATURE_CONSTRAINTS" in str(caught.value)


async def test_hashes_are_computed_once_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    links = [make_link(0), make_link(1), make_link(2, fingerprint=b"g"), make_link(3, fingerprint=b"g")]
    for link in links:
        hold(link, PROMPT[: 16 * (1 + links.index(link))])
    asked: list[bytes] = []
    real = fleet.prefix_root

    def count(worker: pb.WorkerInfo, scope: bytes) -> bytes:
        asked.append(worker.model_fingerprint)
        return real(worker, scope)

    monkeypatch.setattr(fleet, "prefix_root", count)
    place = await make_fleet(*links).place("m", PROMPT, SCOPE)
    assert (place.link, place.uncached_tokens) == (links[3], 100 - 64)
    assert asked == [b"f", b"g"]


async def test_load_counts_from_the_dispatch_until_the_first_token_and_the_end() -> None:
    link = make_link(0, running=8)
    fleet = make_fleet(link)
    hold(link, PROMPT)
    (_, first), (_, second) = await put(fleet, [*PROMPT, 1]), await put(fleet, bypass=True)
    assert (link.streams, link.pending_tokens) == (2, 5 + 100)
    step = pb.Step(sequences=[pb.SequenceStep(attempt=second, token_index=0, token_ids=[1])])
    link._take(pb.ServeResponse(step=step))
    assert (link.streams, link.pending_tokens) == (2, 5)
    link.release(second, finished=True)
    link.release(first, finished=False)
    link.release(first, finished=False)
    assert (link.streams, link.pending_tokens) == (0, 0)


@pytest.mark.parametrize("end", ["refused", "failed", "lost"])
async def test_load_is_given_back_however_a_request_ends(end: str) -> None:
    link = make_link(0)
    _, attempt = await put(make_fleet(link))
    match end:
        case "refused":
            refused = pb.Refused(attempt=attempt, reason=pb.REFUSED_REASON_QUEUE_FULL)
            link._take(pb.ServeResponse(refused=refused))
        case "failed":
            link._take(pb.ServeResponse(failed=pb.Failed(attempt=attempt)))
        case _:
            link._lose()
    assert (link.streams, link.pending_tokens) == (0, 0)
    link.release(attempt, finished=False)
    assert (link.streams, link.pending_tokens) == (0, 0)


async def test_a_burst_on_one_hot_prefix_spreads() -> None:
    links = [make_link(n, running=64) for n in range(2)]
    fleet = make_fleet(*links)
    hold(links[0], PROMPT)
    for number in range(16):
        await put(fleet, [*PROMPT, number])
    assert all(link.streams >= 2 for link in links)


async def test_workers_that_are_not_ready_or_full_or_of_another_model_are_no_candidates() -> None:
    down, full, other, free = make_link(0), make_link(1, running=1, waiting=0), make_link(2, model="n"), make_link(3)
    down.ready = False
    full.submit(journal(), pb.Submit())
    for link in (down, full, other):
        hold(link, PROMPT)
    for policy in POLICIES:
        for _ in range(3):
            place = await make_fleet(down, full, other, free, policy=policy).place("m", PROMPT, SCOPE)
            assert place.link is free


async def test_room_is_what_ready_workers_still_take_and_none_ready_is_not_full() -> None:
    links = [make_link(n, running=1, waiting=1) for n in range(2)]
    fleet = make_fleet(*links)
    for left in (4, 3, 2, 1):
        assert fleet.room(Wanted("m")) == left
        await put(fleet)
    assert [link.streams for link in links] == [2, 2]
    assert fleet.room(Wanted("m")) == 0
    with pytest.raises(AllFull):
        await fleet.place("m", PROMPT, SCOPE)
    assert (await fleet.place("m", PROMPT, SCOPE, moved=True)).link in links
    for link in links:
        link.ready = False
    assert fleet.room(Wanted("m")) is None
    assert fleet.room(Wanted("n")) is None
    with pytest.raises(QwireError) as caught:
        await fleet.place("m", PROMPT, SCOPE)
    assert caught.value.reason == Reason.NO_WORKER


async def test_what_there_is_to_compute_takes_as_long_as_workers_say_that_it_does() -> None:
    links = [make_link(n) for n in range(2)]
    fleet = make_fleet(*links)
    assert fleet.prefill_seconds("m", 1000) == 0  # nothing was measured
    for link, rate in zip(links, (100, 300), strict=True):
        link._take(pb.ServeResponse(heartbeat=pb.Heartbeat(load=pb.Load(prefill_tokens_per_second=rate))))
    await put(fleet)
    assert fleet.prefill_seconds("m", 900) == (100 + 900) / 400
    links[1].ready = False
    assert fleet.prefill_seconds("m", 100) == 2


def test_a_model_is_known_by_its_name_or_as_the_only_one() -> None:
    fleet = make_fleet(make_link(0), make_link(1))
    assert [fleet.known_model(name) for name in ("", "m", "n")] == ["m", "m", ""]
    assert make_fleet(make_link(0), make_link(1, model="n")).known_model("") == ""


async def test_turns_of_one_model_are_not_taken_by_another() -> None:
    links = [make_link(n, model=model) for n, model in enumerate("mmnn")]
    fleet = make_fleet(*links, policy="round-robin")
    places = [(await fleet.place(model, PROMPT, SCOPE)).link for model in "mnmn"]
    assert places == [links[0], links[2], links[1], links[3]]


async def test_a_request_waits_for_a_worker_to_get_ready() -> None:
    link = make_link(0)
    link.ready = False
    placing = asyncio.create_task(make_fleet(link, wait=5).place("m", PROMPT, SCOPE))
    await asyncio.sleep(0.01)
    link._set_ready(True)
    assert (await placing).link is link


async def test_a_prompt_is_looked_up_once_for_all_workers_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = BlockIndex()
    links = [make_link(number, cache=CacheIndex(table, number)) for number in range(3)]
    for link in links:
        hold(link, PROMPT[: 16 * (1 + links.index(link))])
    asked: list[list[int]] = []
    real = BlockIndex.leading

    def count(self: BlockIndex, keys: Sequence[int], workers: Iterable[int]) -> dict[int, int]:
        asked.append(sorted(workers))
        return real(self, keys, workers)

    monkeypatch.setattr(BlockIndex, "leading", count)
    place = await make_fleet(*links).place("m", PROMPT, SCOPE)
    assert (place.link, place.uncached_tokens) == (links[2], 100 - 48)
    assert asked == [[0, 1, 2]]
