"""Memory that goes where it is needed: slabs move, reserves stay, and nothing that is held is touched."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from hkv_jax.kvcache.layout import plan_layout
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.testing.cache_layouts import tiny_group, tiny_layout_request
from hkv_jax.testing.cached_sequences import CachedSequences

GLOBAL, SLIDING = 0, 1


def make(partition: str = "moving", **changes: Any) -> CachedSequences:
    """Global blocks of 8 tokens, sliding ones of 4, window 16; most memory is for windows at first."""
    request = tiny_layout_request(partition=partition, **{"expected_average_seq_length": 16, **changes})
    return CachedSequences(plan_layout(request))


def slabs(cached: CachedSequences) -> list[int]:
    return [len(group.pool.slabs) for group in cached.cache._groups]


def fill(cached: CachedSequences, lane: int, num_tokens: int, first: int = 0, chunk: int = 32) -> bool:
    """Runs a prompt that nobody else has, chunk by chunk, while there is room."""
    tokens = [1000 * lane + first + token for token in range(num_tokens)]
    cached.open(lane, tokens)
    chain = cached.path(tokens).chain
    for start in range(0, num_tokens, chunk):
        if not cached.cache.extend(lane, start, min(num_tokens, start + chunk)):
            return False
        cached.ends[lane] = min(num_tokens, start + chunk)
        cached.cache.record(lane, chain, cached.ends[lane], {})
        cached.cache.check_invariants()
    return True


def test_empty_slabs_go_to_whoever_is_short() -> None:
    cached = make(budget_bytes=30_000)
    before = slabs(cached)
    lanes = [lane for lane in range(6) if fill(cached, lane, 128)]
    after = slabs(cached)
    assert after[GLOBAL] > before[GLOBAL]
    assert sum(after) == sum(before)
    assert cached.cache.num_slabs_moved == after[GLOBAL] - before[GLOBAL]
    static = make("static", budget_bytes=30_000)
    assert len([lane for lane in range(6) if fill(static, lane, 128)]) < len(lanes)
    assert static.cache.num_slabs_moved == 0


@pytest.mark.parametrize(("short", "other", "expected"), [(GLOBAL, SLIDING, 16), (SLIDING, GLOBAL, 128)])
def test_nobody_goes_below_their_reserve(short: int, other: int, expected: int) -> None:
    cached = make(budget_bytes=30_000, expected_average_seq_length=expected)
    before, reserves = slabs(cached), [group.reserve_slabs for group in cached.cache.layout.groups]
    needs = [0, 0]
    needs[short] = 1000
    assert not cached.cache._boundary.make_room(needs)
    assert slabs(cached)[other] == reserves[other] < before[other]
    assert sum(slabs(cached)) == sum(before)
    cached.check()


def test_a_static_boundary_does_not_move_within_an_arena_either() -> None:
    windows = [tiny_group(16), tiny_group(24)]
    groups = (tiny_group(None), *(dataclasses.replace(each, name=f"sliding_w{each.window}") for each in windows))
    for partition in ("static", "moving"):
        cached = make(partition, groups=groups, block_sizes={"global": 8, "sliding": 4}, budget_bytes=80_000)
        assert len(cached.cache.layout.arenas) == (2 if partition == "static" else 1)
        assert not cached.cache._boundary.make_room([0, 1000, 0])
        assert (cached.cache.num_slabs_moved > 0) == (partition == "moving")


def test_nobody_gives_what_they_need_themselves() -> None:
    cached = make(budget_bytes=30_000)
    before, per_slab = slabs(cached), [group.blocks_per_slab for group in cached.cache.layout.groups]
    everything = [count * blocks for count, blocks in zip(before, per_slab, strict=True)]
    assert cached.cache._boundary.make_room(everything)
    assert not cached.cache._boundary.make_room([everything[GLOBAL] + 1, everything[SLIDING]])
    assert slabs(cached) == before
    assert cached.cache._boundary.make_room([everything[GLOBAL] + 1, everything[SLIDING] - per_slab[SLIDING]])
    assert slabs(cached) == [before[GLOBAL] + 1, before[SLIDING] - 1]


def test_what_could_be_held_if_everything_cached_went() -> None:
    cached = make(budget_bytes=30_000)
    boundary, per_slab = cached.cache._boundary, [group.blocks_per_slab for group in cached.cache.layout.groups]
    total, reserve = sum(slabs(cached)), cached.cache.layout.groups[SLIDING].reserve_slabs
    most = (total - reserve) * per_slab[GLOBAL]
    assert boundary.could_hold([most, 0])
    assert not boundary.could_hold([most + 1, 0])
    cached.leave(list(range(5000, 5100)))
    assert boundary.could_hold([most, 0]), "what is cached is in nobody's way"
    assert fill(cached, 0, 40)
    assert boundary.could_hold([most - 5, 0])
    assert not boundary.could_hold([most - 4, 0])
    static = make("static", budget_bytes=30_000)
    assert static.cache._boundary.could_hold([group.num_blocks for group in static.cache.layout.groups])
    assert not static.cache._boundary.could_hold([static.cache.layout.groups[GLOBAL].num_blocks + 1, 0])


def test_held_blocks_stay_where_they_are() -> None:
    cached = make(budget_bytes=30_000)
    for lane in range(3):
        assert fill(cached, lane, 40)
    before = [cached.ids(group, lane) for group in (GLOBAL, SLIDING) for lane in range(3)]
    assert not all(fill(cached, lane, 128) for lane in (3, 4, 5))
    assert cached.cache.num_slabs_moved > 0
    assert [cached.ids(group, lane) for group in (GLOBAL, SLIDING) for lane in range(3)] == before


def test_what_lives_is_gathered_for_those_that_lacked_memory() -> None:
    layout = plan_layout(tiny_layout_request(budget_bytes=60_000, expected_average_seq_length=16))
    cached = CachedSequences(layout, num_lanes=34)
    # Two short ones share each slab of windows; long ones take all that is left, and then every other short one ends.
    assert all(fill(cached, lane, 4) for lane in range(26))
    assert cached.cache.gather() == ([], []), "nobody lacks anything"
    assert not all(fill(cached, lane, 128, chunk=8) for lane in range(26, 34))
    for lane in range(0, 26, 2):
        cached.cache.close(lane)
        cached.ends.pop(lane)
    assert cached.cache.gather() == ([], []), "nobody lacks anything now"
    assert not all(fill(cached, lane, 128, chunk=8) for lane in range(0, 26, 2))
    before = {lane: cached.cache.table_rows(lane) for lane in cached.ends}
    held, owned = cached.used(), slabs(cached)
    moved = cached.cache.num_slabs_moved
    copies, lanes = cached.cache.gather()
    cached.check()
    (giver,) = {group for group, _, _ in copies}
    assert cached.cache.num_slabs_moved > moved
    assert slabs(cached)[giver] == owned[giver] - (cached.cache.num_slabs_moved - moved)
    assert cached.used() == held
    assert cached.cache.copied_bytes == len(copies) * layout.groups[giver].format.block_bytes
    known = {int(page) for rows in before.values() for page in rows[giver] if page}
    pages = {source: target for _, source, target in copies}
    assert len(set(pages.values())) == len(copies) == len(pages)
    assert known.isdisjoint(pages.values()), "a block was copied onto one that lives"
    for lane, rows in before.items():
        now = cached.cache.table_rows(lane)
        assert now[1 - giver].tolist() == rows[1 - giver].tolist()
        assert now[giver].tolist() == [pages.get(int(page), int(page)) for page in rows[giver]]
        assert (lane in lanes) == (now[giver].tolist() != rows[giver].tolist())
    assert cached.cache.gather() == ([], []), "once a lack"


def test_what_is_cached_goes_before_anybody_is_refused() -> None:
    cached = make(budget_bytes=30_000)
    for number in range(60):
        cached.leave([10_000 + 100 * number + token for token in range(40)])
    assert cached.prefixes.joins.num_evicted, "the pools never filled up"
    assert cached.used() == [0, 0]
    assert sum(pool.cached_blocks for pool in cached.cache.stats()) > 20
    fresh = make(budget_bytes=30_000)
    for lane in range(6):
        assert fill(cached, lane, 128) == fill(fresh, lane, 128)
    cached.check()
    assert cached.used()[GLOBAL] == fresh.used()[GLOBAL]


@pytest.mark.parametrize("partition", ["moving", "static"])
def test_one_sequence_of_any_length_always_has_room(partition: str) -> None:
    rng = np.random.default_rng(3)
    cached = make(partition, budget_bytes=30_000)
    for turn in range(40):
        num_tokens = int(rng.integers(1, 129))
        cached.leave([int(token) for token in rng.integers(0, 3, num_tokens)] + [turn], chunk=24)
        if rng.random() < 0.5:
            assert fill(cached, 0, 128, first=turn)
            cached.cache.close(0)
            cached.ends.pop(0)
    assert (cached.cache.num_slabs_moved > 0) == (partition == "moving")


def alternate(policy: CachePolicy, budget_bytes: int, turns: int = 12) -> list[tuple[int, int, int]]:
    """Turns of three long sequences and of twelve short ones, none of which comes again.

    Returns of each turn how many slabs moved, by how many the boundary is another then, and how many slabs the blocks
    taken would fill.
    """
    layout = plan_layout(tiny_layout_request(budget_bytes=budget_bytes, expected_average_seq_length=16))
    cached = CachedSequences(layout, policy, num_lanes=20)
    result = []
    for turn in range(turns):
        moved, before, taken = cached.cache.num_slabs_moved, slabs(cached), 0
        for lane, length in enumerate([128] * 3 if turn % 2 else [12] * 12):
            assert fill(cached, lane, length, first=200 * turn)
            per_slab = [group.block_size * group.layout.blocks_per_slab for group in cached.cache._groups]
            taken += sum(-(-length // num_tokens) for num_tokens in per_slab)
        for lane in list(cached.ends):
            cached.close(lane)
        net = abs(slabs(cached)[GLOBAL] - before[GLOBAL])
        result.append((cached.cache.num_slabs_moved - moved, net, taken))
    return result


def test_traffic_that_alternates_moves_the_boundary_once_where_both_kinds_fit() -> None:
    turns = alternate(CachePolicy(enabled=False), 60_000)
    assert sum(moves for moves, _, _ in turns[:2]) > 0
    assert sum(moves for moves, _, _ in turns[2:]) == 0


def test_no_slab_goes_back_and_forth_within_a_turn() -> None:
    turns = alternate(CachePolicy(enabled=False), 46_000)
    assert all(moves == net for moves, net, _ in turns)


def test_whoever_had_to_evict_gives_what_it_has_too_much_of_since() -> None:
    layout = plan_layout(tiny_layout_request(budget_bytes=46_000, expected_average_seq_length=16))
    cached = CachedSequences(layout, num_lanes=20)
    for turn in range(12):
        for lane, length in enumerate([128] * 3 if turn % 2 else [12] * 12):
            if not fill(cached, lane, length, first=200 * turn):
                # What lives lies scattered. It all fits: without a cache it did.
                start = cached.ends[lane]
                assert cached.cache.gather()[0]
                for begin in range(start, length, 32):
                    assert cached.cache.extend(lane, begin, min(length, begin + 32))
                cached.ends[lane] = length
        for lane in list(cached.ends):
            cached.close(lane)


def test_what_is_kept_for_later_makes_the_boundary_move_no_more_than_memory_is_taken() -> None:
    turns = alternate(CachePolicy(), 60_000)
    assert all(moves <= taken for moves, _, taken in turns)
    assert any(moves for moves, _, _ in turns[2:]), "all memory is in use: whoever lacks some takes it from the other"
