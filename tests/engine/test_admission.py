"""Who goes first, who waits for a prefix that is being computed, and that nobody waits for ever."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import pytest

from hkv_jax.engine.admission import REVISIONS_A_STEP
from hkv_jax.engine.plan import StepPlan
from hkv_jax.kvcache.prefix_cache import PrefixCache
from hkv_jax.kvcache.prefix_match import PrefixPath, PrefixUse
from hkv_jax.outputs import PrefixHit
from hkv_jax.testing.cached_sequences import lose_tails
from hkv_jax.testing.fake_engine import FakeEngineConfig, tight_config
from hkv_jax.testing.hand_driven import HandDriven, chunks_of

BASE = FakeEngineConfig()
ALONE = dataclasses.replace(BASE, max_num_seqs=1)
DOCUMENT = [50 + token % 40 for token in range(48)]


def names(plan: StepPlan) -> list[str]:
    return [sequence.request.request_id for sequence in plan.admitted]


def run_out(driven: HandDriven) -> None:
    """Until nothing is left to do."""
    while (plan := driven.try_plan()) is not None:
        driven.commit(plan)


def with_document(config: FakeEngineConfig) -> HandDriven:
    """Somebody has asked about the document; 48 tokens of it are cached."""
    driven = HandDriven(config)
    driven.add("first", [*DOCUMENT, 1], max_tokens=1)
    run_out(driven)
    return driven


def test_whose_prefix_is_cached_goes_before_those_that_came_earlier() -> None:
    driven = with_document(ALONE)
    driven.add("other", 30, max_tokens=1)
    driven.add("cached", [*DOCUMENT, 2], max_tokens=1)
    plan = driven.plan()
    assert names(plan) == ["cached"]
    assert [chunk[1:3] for chunk in chunks_of(plan)] == [(48, 49)]
    driven.commit(plan)
    assert names(driven.plan()) == ["other"]


def test_what_is_cached_since_it_came_counts() -> None:
    driven = HandDriven(ALONE)
    driven.add("first", [*DOCUMENT, 1], max_tokens=1)
    driven.add("other", 30, max_tokens=1)
    driven.add("since", [*DOCUMENT, 2], max_tokens=1)
    plans = [driven.plan()]
    while (plan := driven.try_plan()) is not None:
        driven.commit(plans[-1])
        plans.append(plan)
    assert [name for plan in plans for name in names(plan)] == ["first", "since", "other"]


@pytest.mark.parametrize("rebuilt", [False, True])
def test_what_was_evicted_since_it_came_does_not_count(rebuilt: bool) -> None:
    long = [*DOCUMENT, *DOCUMENT]
    driven = HandDriven(ALONE)
    driven.add("first", [*long, 1], max_tokens=1)
    run_out(driven)
    if rebuilt:
        lose_tails(driven.cache)
    driven.add("busy", 9, max_tokens=1)
    plan = driven.plan()
    driven.add("other", 30, max_tokens=1)
    driven.add("was cached", [*long, 2], max_tokens=1)
    lose_tails(driven.cache)
    for group in driven.cache._groups:
        group.pool.release(group.pool.allocate(group.pool.num_free) or [])
    driven.commit(plan)
    order = names(plan)
    while (later := driven.try_plan()) is not None:
        order += names(later)
        driven.commit(later)
    assert order == ["busy", "other", "was cached"]


def test_a_little_that_is_cached_makes_nobody_first() -> None:
    driven = with_document(ALONE)
    driven.add("other", 30, max_tokens=1)
    driven.add("hardly", [*DOCUMENT[:16], *range(1, 41)], max_tokens=1)
    assert names(driven.plan()) == ["other"]


def test_of_two_whose_prefix_is_cached_the_older_goes_first() -> None:
    driven = with_document(ALONE)
    for number in range(3):
        driven.add(f"cached {number}", [*DOCUMENT, 2 + number], max_tokens=1)
    order = []
    while (plan := driven.try_plan()) is not None:
        order += names(plan)
        driven.commit(plan)
    assert order == ["cached 0", "cached 1", "cached 2"]


@pytest.mark.parametrize("seconds", [0.0, 5.0, 30.0])
def test_nobody_is_passed_over_for_longer_than_allowed(seconds: float) -> None:
    driven = with_document(dataclasses.replace(ALONE, max_bypass_seconds=seconds))
    driven.add("other", 30, max_tokens=1)
    admitted: dict[str, float] = {}
    for number in range(60):
        # One that is cached comes before each step, which takes a second.
        driven.add(f"cached {number}", [*DOCUMENT, number], max_tokens=1)
        plan = driven.plan()
        admitted |= dict.fromkeys(names(plan), driven.now)
        driven.commit(plan)
        driven.now += 1
    assert seconds <= admitted["other"] <= seconds + 2


def test_past_twice_the_bound_age_alone_counts() -> None:
    driven = with_document(dataclasses.replace(ALONE, max_bypass_seconds=5.0))
    for number in range(4):
        driven.add(f"other {number}", 30, max_tokens=1)
        driven.add(f"cached {number}", [*DOCUMENT, number], max_tokens=1)
        driven.now += 1
    driven.now = 20.0
    order = []
    while (plan := driven.try_plan()) is not None:
        order += names(plan)
        driven.commit(plan)
    assert order == [f"{kind} {number}" for number in range(4) for kind in ("other", "cached")]


def test_everybody_is_served_however_the_cache_tempts() -> None:
    driven = with_document(dataclasses.replace(ALONE, max_bypass_seconds=4.0))
    waits: list[float] = []
    came: dict[str, float] = {}
    for number in range(80):
        name = f"{number}"
        came[name] = driven.now
        driven.add(name, [*DOCUMENT, number] if number % 3 else [number % 40 + 1] * 20, max_tokens=1)
        if number % 4:  # more come than can be served, for a while
            plan = driven.plan()
            waits += [driven.now - came[each] for each in names(plan)]
            driven.commit(plan)
            driven.now += 1
    while (last := driven.try_plan()) is not None:
        waits += [driven.now - came[each] for each in names(last)]
        driven.commit(last)
        driven.now += 1
    assert len(waits) == 80
    # Twenty more came than were served: nobody waits much longer than those it would take in order of age.
    assert max(waits) <= 20 + 2 * 4 + 2


SLOW = dataclasses.replace(BASE, max_prefill_chunk=8)


def test_who_comes_while_its_prefix_is_computed_waits_for_it() -> None:
    driven = HandDriven(SLOW)
    driven.add("leader", [*DOCUMENT, 1])
    driven.add("follower", [*DOCUMENT, 2])
    driven.add("stranger", 9)
    plans = [driven.plan()]
    assert names(plans[0]) == ["leader", "stranger"]
    assert driven.scheduler.prefix_stats.prefix_waits == 1
    assert driven.scheduler.num_waiting == 1
    while "follower" not in names(plans[-1]):
        driven.commit(plans[-1])
        plans.append(driven.plan())
    assert [chunk[:3] for chunk in chunks_of(plans[-1]) if chunk[0] == "follower"] == [("follower", 48, 49)]
    assert len(plans) <= 8
    follower = plans[-1].admitted[0]
    assert follower.first_prefix == PrefixUse(48, 48, PrefixHit.RESIDENT, 0)


def test_it_waits_only_for_what_both_have() -> None:
    driven = HandDriven(SLOW)
    driven.add("leader", [*DOCUMENT, *range(1, 41)])
    driven.add("follower", [*DOCUMENT[:32], *range(30)])
    starts: dict[str, tuple[int, PrefixUse | None]] = {}
    for step in range(20):
        plan = driven.plan()
        starts |= {each.request.request_id: (step, each.first_prefix) for each in plan.admitted}
        driven.commit(plan)
    step, use = starts["follower"]
    assert use is not None
    assert use.start == 32
    # Four steps compute what they share; the leader has seven more to go.
    assert step <= 5


def test_the_wait_is_bounded() -> None:
    driven = HandDriven(dataclasses.replace(SLOW, max_prefix_wait_seconds=2.0))
    driven.add("leader", [*DOCUMENT, *DOCUMENT, 1])
    driven.add("follower", [*DOCUMENT, *DOCUMENT, 2])
    admitted: dict[str, float] = {}
    for _ in range(8):
        plan = driven.plan()
        admitted |= dict.fromkeys(names(plan), driven.now)
        driven.commit(plan)
        driven.now += 1
    assert 2.0 <= admitted["follower"] <= 3.0
    assert driven.scheduler.prefix_stats.prefix_waits == 1, "who has waited long enough does not wait again"


def test_nobody_waits_where_no_time_is_allowed() -> None:
    driven = HandDriven(dataclasses.replace(SLOW, max_prefix_wait_seconds=0.0))
    driven.add("leader", [*DOCUMENT, 1])
    driven.add("follower", [*DOCUMENT, 2])
    assert names(driven.plan()) == ["leader", "follower"]
    assert driven.scheduler.prefix_stats.prefix_waits == 0


def leader_aborts(driven: HandDriven) -> None:
    driven.scheduler.abort("leader")


def leader_stops(driven: HandDriven) -> None:
    driven.scheduler.finish("leader", 0)


def steps_are_lost(driven: HandDriven) -> None:
    driven.scheduler.reset()
    driven.scheduler.abort("leader")


@pytest.mark.parametrize("ends", [leader_aborts, leader_stops, steps_are_lost])
def test_when_the_leader_goes_its_followers_go_on(ends: Callable[[HandDriven], None]) -> None:
    driven = HandDriven(SLOW)
    driven.add("leader", [*DOCUMENT, 1])
    driven.add("follower", [*DOCUMENT, 2])
    driven.add("another", [*DOCUMENT, 3])
    for _ in range(2):
        driven.commit(driven.plan())
    assert driven.scheduler.num_waiting == 2
    ends(driven)
    plan = driven.plan()
    assert names(plan) == ["follower"], "and the next waits for the first of them"
    run_out(driven)
    assert not driven.scheduler.has_work


@pytest.mark.usefixtures("short_sighted")
def test_when_the_leader_is_preempted_its_followers_go_on() -> None:
    driven = HandDriven(dataclasses.replace(tight_config(8, 64), max_prefill_chunk=8))
    driven.add("old", 5)
    driven.commit(driven.plan())
    driven.add("leader", [*DOCUMENT, 1], max_tokens=1)
    driven.add("follower", [*DOCUMENT, 2], max_tokens=1)
    while not driven.scheduler.num_preemptions:  # "old" grows until it takes the blocks of the prefill
        driven.commit(driven.plan())
    assert driven.scheduler.prefix_stats.prefix_waits == 1
    assert driven.scheduler.num_waiting == 2
    driven.scheduler.abort("old")
    order = []
    while (plan := driven.try_plan()) is not None:
        order += names(plan)
        driven.commit(plan)
    assert order == ["leader", "follower"]
    assert not driven.scheduler.has_work


def test_a_follower_that_leaves_is_not_waited_for() -> None:
    driven = HandDriven(SLOW)
    driven.add("leader", [*DOCUMENT, 1], max_tokens=1)
    driven.add("follower", [*DOCUMENT, 2])
    driven.commit(driven.plan())
    driven.scheduler.abort("follower")
    driven.scheduler.check_invariants()
    run_out(driven)
    assert not driven.scheduler.has_work
    assert driven.scheduler.num_waiting == 0


Result = TypeVar("Result")


def counted_calls(act: Callable[[], Result]) -> tuple[int, Result]:
    """Python functions called by ``act``, and what it returns."""
    count = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        result = act()
    finally:
        sys.setprofile(None)
    return count, result


def busy(num_waiting: int, max_num_seqs: int, max_prefix_wait_seconds: float = 30.0) -> HandDriven:
    """Two long generations; whoever waits lacks a lane or blocks."""
    config = dataclasses.replace(BASE, max_num_seqs=max_num_seqs, kv_cache_memory=36 * 1024, max_num_batched_tokens=32)
    driven = HandDriven(dataclasses.replace(config, max_prefix_wait_seconds=max_prefix_wait_seconds))
    for name in ("a", "b"):
        driven.add(name, 40)
        driven.commit(driven.plan())
    for _ in range(6):
        driven.commit(driven.plan())
    for number in range(num_waiting):
        driven.add(f"w{number}", [*DOCUMENT, number % 97, number // 97, *range(50)])
    for _ in range(4):
        driven.commit(driven.plan())
    assert driven.scheduler.num_waiting == num_waiting
    return driven


@pytest.mark.parametrize("max_num_seqs", [2, 4])
def test_a_step_costs_the_same_however_many_wait(max_num_seqs: int) -> None:
    calls = []
    for num_waiting in (1, 1000):
        driven = busy(num_waiting, max_num_seqs)
        # In sixteen steps each of the two takes and gives back blocks.
        count = 0
        for _ in range(16):
            calls_of_step, plan = counted_calls(driven.scheduler.schedule)
            count += calls_of_step
            assert plan is not None
            driven.commit(plan)
        calls.append(count)
    few, many = calls
    assert many <= 1.1 * few + 16


def revisions(driven: HandDriven, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matches each step revises while somebody computes the document that all others wait to ask about."""
    revised: list[PrefixPath] = []
    choose = PrefixCache.choose

    def counting(self: PrefixCache, path: PrefixPath) -> PrefixUse:
        revised.append(path)
        return choose(self, path)

    monkeypatch.setattr(PrefixCache, "choose", counting)
    driven.scheduler.abort("a")
    counts = []
    for _ in range(20):
        revised.clear()
        driven.commit(driven.plan())
        counts.append(len(revised))
    return counts


@pytest.mark.parametrize("max_prefix_wait_seconds", [0.0, 30.0])
def test_matches_are_revised_a_few_a_step(max_prefix_wait_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = revisions(busy(300, 4, max_prefix_wait_seconds), monkeypatch)
    assert any(counts)
    assert max(counts) <= 24, "of 300 that wait, for the prefix or not"
    assert sum(counts) <= 3 * 300


def test_who_waits_for_a_prefix_takes_no_turn_of_those_whose_match_must_be_revised() -> None:
    driven = HandDriven(dataclasses.replace(BASE, max_num_seqs=2, max_prefill_chunk=16))
    driven.add("leader", [*DOCUMENT, *DOCUMENT[:40], 1], max_tokens=1)
    driven.commit(driven.plan())
    for number in range(2 * REVISIONS_A_STEP):
        driven.add(f"follower {number}", [*DOCUMENT, *DOCUMENT[:40], 2 + number], max_tokens=1)
    for _ in range(3):
        driven.commit(driven.plan())
        assert driven.scheduler.prefix_stats.prefix_waits == driven.scheduler.num_waiting == 2 * REVISIONS_A_STEP
        assert not driven.scheduler._waiting._dirty
