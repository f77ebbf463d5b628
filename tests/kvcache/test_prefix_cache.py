"""What sequences leave in the cache and find again: hits, rebuilds, duplicates, and what is never found."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hkv_jax.kvcache.block_table import HOLE
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.join_point import JoinKind
from hkv_jax.kvcache.layout import least_bytes, plan_layout
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.kvcache.prefix_match import PrefixUse
from hkv_jax.outputs import PrefixHit
from hkv_jax.spec import KVGroupSpec, LayerKind
from hkv_jax.testing.cache_layouts import tiny_layout_request
from hkv_jax.testing.cached_sequences import CachedSequences, lose_tails

GLOBAL, SLIDING = 0, 1

# Two sliding layers of 5 tokens and a global one: R is 4 + 4 tokens in blocks of 4.
GROUPS = (
    KVGroupSpec("global", LayerKind.GLOBAL, None, 1, 8, (1,)),
    KVGroupSpec("sliding", LayerKind.SLIDING, 5, 1, 8, (0, 2)),
)
PROMPT = list(range(100, 164))


def make(policy: CachePolicy | None = None, **changes: Any) -> CachedSequences:
    """Global blocks of 8 tokens, sliding ones of 4, window 5: a tail is one block."""
    request = tiny_layout_request(groups=GROUPS, **{"expected_average_seq_length": 64, **changes})
    return CachedSequences(plan_layout(request), policy)


@pytest.mark.parametrize(("num_tokens", "found"), [(64, 56), (65, 64), (57, 56), (56, 48), (9, 8), (8, 0), (1, 0)])
def test_a_prompt_that_was_run_is_found_up_to_its_last_token(num_tokens: int, found: int) -> None:
    cached = make()
    prompt = [*PROMPT, 7, 8][:num_tokens]
    for end in range(8, num_tokens, 8):  # a tail at each block, whatever the policy would leave
        lane = 0
        if end == 8:
            cached.open(lane, prompt)
        cached.run(lane, end, {end: JoinKind.TURN})
    if num_tokens > 8:
        cached.run(0, num_tokens)
        cached.close(0)
    use = cached.use_of(prompt)
    assert use == PrefixUse(found, found, PrefixHit.RESIDENT if found else PrefixHit.MISS, 0)


def test_loaded_blocks_are_those_that_were_left_and_are_held_at_once() -> None:
    cached = make()
    cached.open(0, PROMPT)
    cached.run(0, 32)
    cached.run(0, 64)
    left = [cached.ids(group, 0) for group in (GLOBAL, SLIDING)]
    cached.close(0)
    assert cached.used() == [0, 0]
    assert [pool.cached_blocks for pool in cached.cache.stats()] == [8, 1]
    use = cached.open(1, [*PROMPT, 1, 2])
    assert use == PrefixUse(64, 64, PrefixHit.RESIDENT, 0)
    assert cached.ids(GLOBAL, 1) == left[GLOBAL]
    assert cached.ids(SLIDING, 1) == left[SLIDING][-1:]
    assert cached.used() == [8, 1]
    cached.evict_all()
    assert cached.ids(GLOBAL, 1) == left[GLOBAL]
    assert [pool.cached_blocks for pool in cached.cache.stats()] == [0, 0]
    cached.run(1, 66)
    assert cached.cache.take_table_updates(GLOBAL)[:, 1].tolist() == [8], "loaded blocks come as a whole row"
    cached.close(1)
    assert cached.used() == [0, 0]


def test_a_rebuild_writes_no_global_block_and_leaves_only_the_exact_tail() -> None:
    cached = make()
    cached.leave(PROMPT)
    lose_tails(cached.cache)
    prompt = [*PROMPT, 1, 2]
    use = cached.open(0, prompt)
    assert use == PrefixUse(56, 64, PrefixHit.REBUILD, 56)
    cached.run(0, 66)
    slots = [cached.cache.write_slots(group, 0, 56, 66) for group in (GLOBAL, SLIDING)]
    assert [(row == NO_SLOT).tolist() for row in slots] == [[True] * 8 + [False] * 2, [True] * 4 + [False] * 6]
    cached.close(0)
    # Position 64 needs 60 and later, the block that is exact; the one before it is polluted.
    node = cached.prefixes.tree.find(cached.path(prompt).chain.digests[7])
    assert node is not None
    assert [block == HOLE for block in node.blocks[SLIDING]] == [True, False]
    assert cached.use_of(prompt) == PrefixUse(64, 64, PrefixHit.RESIDENT, 0)


def test_polluted_blocks_are_never_found_however_the_zone_is_cut() -> None:
    for chunks in ([64, 66], [58, 60, 64, 66], [57, 61, 63, 66], [66]):
        cached = make()
        cached.leave(PROMPT)
        lose_tails(cached.cache)
        prompt = [*PROMPT, 1, 2]
        cached.open(0, prompt)
        for end in chunks:
            cached.run(0, end)
        last = cached.prefixes.tree.find(cached.path(prompt).chain.digests[7])
        assert last is not None
        assert [block == HOLE for block in last.blocks[SLIDING]] == [True, False], chunks
        cached.close(0)
        assert cached.use_of(prompt) == PrefixUse(64, 64, PrefixHit.RESIDENT, 0)


def test_a_zone_left_in_the_middle_leaves_nothing_wrong() -> None:
    cached = make()
    cached.leave(PROMPT)
    lose_tails(cached.cache)
    cached.open(0, [*PROMPT, 1])
    cached.run(0, 60)
    cached.evict_all()
    assert cached.used()[GLOBAL] == 8, "all of the cached prefix stays pinned until the zone ends"
    cached.close(0)
    assert cached.used() == [0, 0]
    use = cached.use_of([*PROMPT, 1])
    assert use == PrefixUse(56, 64, PrefixHit.REBUILD, 56)
    cached.evict_all()
    assert cached.used() == [0, 0]
    cached.check()


@pytest.mark.parametrize("chunks", [(32,), (16, 32), (5, 20, 32)])
def test_what_two_compute_at_the_same_time_is_merged(chunks: tuple[int, ...]) -> None:
    cached = make()
    for lane in (0, 1):
        assert cached.open(lane, PROMPT).start == 0
    cached.run(0, 32)
    for end in chunks:
        cached.run(1, end)
    assert cached.ids(GLOBAL, 0) == cached.ids(GLOBAL, 1)
    assert cached.used()[GLOBAL] == 4
    # The device learns which blocks the second now reads.
    updates = cached.cache.take_table_updates(GLOBAL)
    row = np.zeros(cached.cache.layout.groups[GLOBAL].table_width, np.int32)
    row[updates[updates[:, 0] == 1, 1]] = updates[updates[:, 0] == 1, 2]
    assert row.tolist() == cached.cache.table_row(GLOBAL, 1).tolist()
    for end in (40, 64):
        for lane in (0, 1):
            cached.run(lane, end)
    assert cached.used()[GLOBAL] == 8
    cached.close(0)
    cached.close(1)
    cached.evict_all()
    assert [pool.cached_blocks + pool.used_blocks for pool in cached.cache.stats()] == [0, 0]


def test_what_a_merged_lane_computes_again_is_not_written() -> None:
    cached = make()
    for lane in (0, 1):
        cached.open(lane, PROMPT)
    cached.run(0, 32)
    assert cached.cache.extend(1, 0, 32)
    before = cached.cache.write_slots(GLOBAL, 1, 0, 32)
    assert NO_SLOT not in before
    cached.cache.record(1, cached.path(PROMPT).chain, 32, {})
    assert set(cached.cache.write_slots(GLOBAL, 1, 0, 32).tolist()) == {NO_SLOT}
    assert NO_SLOT not in cached.cache.write_slots(GLOBAL, 0, 0, 32)


def test_a_running_sequence_keeps_its_last_full_block_and_gives_up_the_one_before() -> None:
    cached = make()
    cached.open(0, PROMPT)
    for end in (8, 16, 24):
        cached.run(0, end, {end: JoinKind.RUNNING})
        assert sorted(join.node.end for join in cached.prefixes.joins.living) == [end]
    cached.open(1, PROMPT[:25])
    cached.run(1, 25)
    cached.run(0, 32, {32: JoinKind.RUNNING})
    # Somebody has joined at 24: it is worth keeping.
    assert sorted(join.node.end for join in cached.prefixes.joins.living) == [24, 32]


def test_a_tail_within_a_chunk_is_kept_where_somebody_will_join() -> None:
    cached = make()
    cached.open(0, PROMPT)
    cached.run(0, 32, {16: JoinKind.TURN})
    assert cached.use_of(PROMPT[:17]) == PrefixUse(16, 16, PrefixHit.RESIDENT, 0)
    without = make()
    without.open(0, PROMPT)
    without.run(0, 32)
    assert without.use_of(PROMPT[:17]).start < 16
    # What is kept beyond the window leaves the table with the next chunk, and stays for others.
    cached.run(0, 40)
    held = cached.used()
    without.run(0, 40)
    assert held == without.used()
    assert cached.use_of(PROMPT[:17]).start == 16


def test_a_tail_that_memory_does_not_allow_stops_nobody() -> None:
    request = tiny_layout_request(groups=GROUPS, partition="static")
    layout = plan_layout(dataclasses.replace(request, budget_bytes=least_bytes(request)))
    cached = CachedSequences(layout)
    assert layout.groups[SLIDING].num_blocks < 7
    cached.open(0, PROMPT)
    cached.run(0, 32, {8: JoinKind.TURN})
    assert not cached.prefixes.joins.living
    cached.run(0, 64)


def test_samples_that_share_a_prompt_share_what_is_found() -> None:
    cached = make()
    cached.leave(PROMPT)
    cached.open(0, [*PROMPT, 1, 2, 3])
    cached.run(0, 66)
    for group in (GLOBAL, SLIDING):
        cached.cache.take_table_updates(group)
    assert cached.cache.fork(0, 1, 66) is not None
    cached.check()
    cached.evict_all()
    held = cached.used()
    cached.close(0)
    assert cached.used()[GLOBAL] == held[GLOBAL] - 1
    cached.cache.close(1)
    cached.check()
    assert cached.used() == [0, 0]


def test_without_caching_nothing_is_named_or_kept() -> None:
    cached = make(CachePolicy(enabled=False))
    cached.leave(PROMPT)
    assert cached.use_of([*PROMPT, 1]).matched == 0
    assert len(cached.prefixes.tree) == 0
    assert all(cached.cache._groups[g].pool.num_loose == 0 for g in (GLOBAL, SLIDING))


def test_without_checkpoints_only_what_happens_to_be_left_is_found() -> None:
    cached = make(CachePolicy(checkpoints=False, tail_repair=False))
    cached.leave(PROMPT)
    assert not cached.prefixes.joins.living
    assert [pool.cached_blocks for pool in cached.cache.stats()] == [0, 0]
    assert cached.use_of([*PROMPT, 1]).hit is PrefixHit.RESIDENT
    lose_tails(cached.cache)
    assert cached.use_of([*PROMPT, 1]).hit is PrefixHit.MISS


def test_without_repair_a_lost_tail_is_a_miss() -> None:
    for repairs, start in ((True, 56), (False, 0)):
        cached = make(CachePolicy(tail_repair=repairs))
        cached.leave(PROMPT)
        lose_tails(cached.cache)
        hit = PrefixHit.REBUILD if repairs else PrefixHit.MISS
        assert cached.use_of([*PROMPT, 1]) == PrefixUse(start, 64, hit, start)


def test_after_a_reset_nothing_is_found() -> None:
    cached = make()
    cached.leave(PROMPT)
    cached.open(0, [*PROMPT, 1])
    cached.run(0, 65)
    with pytest.raises(AssertionError, match="a lane is still open"):
        cached.cache.reset()
    cached.cache.close(0)
    cached.cache.reset()
    cached.check()
    assert cached.use_of([*PROMPT, 1]) == PrefixUse(0, 0, PrefixHit.MISS, 0)
    assert [pool.cached_blocks for pool in cached.cache.stats()] == [0, 0]
    cached.ends.clear()
    cached.leave(PROMPT)
    assert cached.use_of([*PROMPT, 1]).start == 64
