"""Cached prefixes in a whole engine: the tokens are those of a cold run, whatever was found, merged, lost or aborted.

The fake device refuses K/V that is not a sequence's own, or is polluted by another's rebuild.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hkv_jax.engine.engine import Engine
from hkv_jax.engine.request import Request
from hkv_jax.engine.token_event import TokenEvent
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.outputs import PrefixHit
from hkv_jax.sampling_params import SamplingParams
from hkv_jax.spec import KVGroupSpec, LayerKind
from hkv_jax.testing.cached_sequences import lose_tails
from hkv_jax.testing.fake_engine import FakeEngineConfig, fake_engine, global_group, run_to_end, sliding_group
from hkv_jax.testing.hand_driven import HandDriven, chunks_of

GLOBAL, SLIDING = 0, 1

# A global layer between two that see 5 tokens: R is 4 + 4 tokens. A rebuild then runs the last block of 8 again.
CONFIG = FakeEngineConfig(
    groups=(
        KVGroupSpec("global", LayerKind.GLOBAL, None, 1, 8, (1,)),
        KVGroupSpec("sliding", LayerKind.SLIDING, 5, 2, 8, (0, 2)),
    )
)
DOCUMENT = [50 + token % 40 for token in range(64)]

Tokens = dict[tuple[str, int], list[int]]


def request(name: str, prompt: list[int], **params: object) -> Request:
    return Request.create(name, prompt, SamplingParams(seed=7, **{"max_tokens": 12, **params}))  # type: ignore[arg-type]


def answers(engine: Engine, *requests: Request) -> dict[str, list[TokenEvent]]:
    """The events of each request's first sample, and of others under ``name/sample``."""
    for each in requests:
        engine.add(each)
    events = run_to_end(engine)
    return {name if sample == 0 else f"{name}/{sample}": seen for (name, sample), seen in events.items()}


def tokens(events: dict[str, list[TokenEvent]]) -> dict[str, list[int]]:
    return {name: [event.token_id for event in seen] for name, seen in events.items()}


def use_of(events: dict[str, list[TokenEvent]], name: str) -> PrefixUse | None:
    return events[name][0].sequence.first_prefix


def cold(*requests: Request) -> dict[str, list[int]]:
    """What each answers on an engine of its own that caches nothing."""
    result: dict[str, list[int]] = {}
    for each in requests:
        result |= tokens(answers(fake_engine(CONFIG, CachePolicy(enabled=False)), each))
    return result


def warm() -> Engine:
    """An engine that has the document in its cache."""
    engine = fake_engine(CONFIG)
    answers(engine, request("first", [*DOCUMENT, 1]))
    return engine


QUESTION = request("question", [*DOCUMENT, 2, 3])


def test_a_hit_answers_as_a_cold_run_does() -> None:
    events = answers(warm(), QUESTION)
    assert use_of(events, "question") == PrefixUse(64, 64, PrefixHit.RESIDENT, 0)
    assert tokens(events) == cold(QUESTION)


@pytest.mark.parametrize("chunk", [3, 8, 32])
def test_a_rebuild_answers_as_a_cold_run_does(chunk: int) -> None:
    engine = fake_engine(dataclasses.replace(CONFIG, max_prefill_chunk=chunk))
    answers(engine, request("first", [*DOCUMENT, 1]))
    lose_tails(engine.cache)
    events = answers(engine, QUESTION)
    assert use_of(events, "question") == PrefixUse(56, 64, PrefixHit.REBUILD, 56)
    assert tokens(events) == cold(QUESTION)
    again = answers(engine, dataclasses.replace(QUESTION, request_id="again"))
    assert use_of(again, "again") == PrefixUse(64, 64, PrefixHit.RESIDENT, 0)
    assert tokens(again)["again"] == tokens(events)["question"]


def test_an_output_that_was_read_is_part_of_what_is_found() -> None:
    engine = fake_engine(CONFIG)
    first = tokens(answers(engine, request("first", [*DOCUMENT, 1], max_tokens=30)))["first"]
    turn = request("turn", [*DOCUMENT, 1, *first, 4, 5], max_tokens=5)
    events = answers(engine, turn)
    use = use_of(events, "turn")
    assert use is not None
    # 65 + 30 tokens, of which the last was drawn and never run.
    assert use.start == 88
    assert tokens(events) == cold(turn)


def test_samples_of_a_prompt_that_is_found_answer_as_in_a_cold_run() -> None:
    for engine in (warm(), warm()):
        several = request("several", [*DOCUMENT, 2, 3, 4], n=3, temperature=1.0)
        events = answers(engine, several)
        assert use_of(events, "several") == PrefixUse(64, 64, PrefixHit.RESIDENT, 0)
        assert tokens(events) == cold(several)
        assert engine.scheduler.prefix_stats.hits[PrefixHit.RESIDENT] == 1


def test_samples_of_a_rebuilt_prompt_answer_as_in_a_cold_run() -> None:
    engine = warm()
    lose_tails(engine.cache)
    several = request("several", [*DOCUMENT, 2, 3, 4], n=3, temperature=1.0)
    events = answers(engine, several)
    assert use_of(events, "several") == PrefixUse(56, 64, PrefixHit.REBUILD, 56)
    assert tokens(events) == cold(several)


def test_who_wants_logprobs_of_the_prompt_computes_it_and_writes_no_cached_block() -> None:
    driven = HandDriven(CONFIG)
    driven.add("first", [*DOCUMENT, 1], max_tokens=1)
    while (plan := driven.try_plan()) is not None:
        driven.commit(plan)
    driven.add("wants", [*DOCUMENT, 2, 3], prompt_logprobs=0)
    spans, written = list[tuple[str, int, int, bool]](), list[int]()
    while not spans or not spans[-1][3]:
        wants = driven.plan()
        spans += chunks_of(wants)
        lane = wants.sequences[0].lane
        written += driven.cache.write_slots(GLOBAL, lane, *spans[-1][1:3]).tolist()
    assert spans[0][1] == 0
    assert [slot != NO_SLOT for slot in written] == [False] * 64 + [True] * 2
    (sequence,) = wants.sequences
    assert sequence.first_prefix == PrefixUse(0, 64, PrefixHit.MISS, 0)


def test_logprobs_of_a_cached_prompt_are_those_of_a_cold_run() -> None:
    wants = dataclasses.replace(request("wants", [*DOCUMENT, 2, 3], prompt_logprobs=2, logprobs=2), request_id="wants")
    found, alone = answers(warm(), wants)["wants"], answers(fake_engine(CONFIG), wants)["wants"]
    assert found[0].prompt_logprobs is not None
    assert len(found[0].prompt_logprobs) == 66
    for pair in zip(found, alone, strict=True):
        for field in ("token_id", "logprob", "prompt_logprobs", "finish_reason"):
            assert getattr(pair[0], field) == getattr(pair[1], field)


def test_what_two_compute_in_the_same_step_is_kept_once() -> None:
    config = dataclasses.replace(CONFIG, max_prefix_wait_seconds=0.0, max_num_batched_tokens=64, max_prefill_chunk=32)
    pair = [request("a", [*DOCUMENT, 1]), request("b", [*DOCUMENT, 2])]
    engine = fake_engine(config)
    for each in pair:
        engine.add(each)
    engine.step()
    (lanes,) = [[sequence.lane for sequence in engine.scheduler.lanes.running()]]
    assert len(lanes) == 2
    assert engine.cache.stats()[GLOBAL].used_blocks == 4, "32 tokens of each, in 4 blocks of both"
    assert engine.cache.table_row(GLOBAL, lanes[0]).tolist() == engine.cache.table_row(GLOBAL, lanes[1]).tolist()
    events = run_to_end(engine)
    assert {name: [event.token_id for event in seen] for (name, _), seen in events.items()} == cold(*pair)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_abort_in_the_middle_of_a_rebuild_leaves_nothing_wrong(steps: int) -> None:
    config = dataclasses.replace(CONFIG, max_prefill_chunk=3)
    engine = fake_engine(config)
    answers(engine, request("first", [*DOCUMENT, 1]))
    lose_tails(engine.cache)
    engine.add(dataclasses.replace(QUESTION, request_id="leaves"))
    for _ in range(steps):
        engine.step()
        engine.scheduler.check_invariants()
    (leaves,) = engine.scheduler.lanes.running()
    position = int(engine.scheduler.lanes.positions[leaves.lane])
    assert 56 < position <= 65
    engine.abort("leaves")
    engine.step()
    engine.scheduler.check_invariants()
    assert all(pool.used_blocks == 0 for pool in engine.cache.stats())
    events = answers(engine, QUESTION)
    assert tokens(events) == cold(QUESTION)
    use = use_of(events, "question")
    assert use is not None
    assert use.matched == 64
    # Only a zone that was run to its end leaves a tail.
    assert use.hit is (PrefixHit.RESIDENT if position >= 64 else PrefixHit.REBUILD)


def test_a_rebuild_survives_the_eviction_of_all_others() -> None:
    engine = fake_engine(dataclasses.replace(CONFIG, max_prefill_chunk=3))
    answers(engine, request("first", [*DOCUMENT, 1]))
    lose_tails(engine.cache)
    engine.add(QUESTION)
    engine.step()
    lose_tails(engine.cache)
    for group in engine.cache._groups:
        group.pool.release(group.pool.allocate(group.pool.num_free) or [])
    events = run_to_end(engine)
    assert [event.token_id for event in events["question", 0]] == cold(QUESTION)["question"]


def test_after_steps_are_lost_nothing_is_found() -> None:
    engine = warm()
    engine.scheduler.reset()
    engine._runner.reset()
    engine.scheduler.check_invariants()
    events = answers(engine, QUESTION)
    assert use_of(events, "question") == PrefixUse(0, 0, PrefixHit.MISS, 0)
    assert tokens(events) == cold(QUESTION)


GROUPS = {
    "hybrid": (global_group(), sliding_group(10)),
    "all global": (global_group(2),),
    "all sliding": (sliding_group(10),),
}


@pytest.mark.parametrize("name", GROUPS)
def test_where_nothing_is_shared_caching_changes_no_step(name: str) -> None:
    config = FakeEngineConfig(groups=GROUPS[name], max_prefill_chunk=16, max_num_seqs=4)
    runs = []
    for enabled in (True, False):
        driven, rng, steps = HandDriven(config, CachePolicy(enabled=enabled)), np.random.default_rng(2), []
        for step in range(40):
            if rng.random() < 0.4:
                n = int(rng.choice([1, 1, 2]))
                driven.add(f"{step}", int(rng.integers(1, 60)), n=n, max_tokens=int(rng.integers(1, 12)))
            if (plan := driven.try_plan()) is not None:
                rows = [(each.request.request_id, each.sample, each.lane) for each in plan.sequences]
                steps.append((rows, plan.decode.positions.tolist(), chunks_of(plan), plan.forks != ()))
                assert plan.table_rows == ()
                driven.commit(plan)
        runs.append(steps)
        assert driven.scheduler.prefix_stats.prefix_hit_tokens == 0
    assert runs[0] == runs[1]
