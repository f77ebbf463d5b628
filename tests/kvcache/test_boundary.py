"""Memory that goes where it is needed: slabs move, reserves stay, and nothing that is held is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hkv_jax.kvcache.layout import plan_layout
from hkv_jax.testing.cache_layouts import tiny_layout_request
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
    cached.open(lane, [1000 * lane + first + token for token in range(num_tokens)])
    for start in range(0, num_tokens, chunk):
        if not cached.cache.extend(lane, start, min(num_tokens, start + chunk)):
            return False
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


def test_traffic_that_alternates_moves_no_more_than_it_needs() -> None:
    cached = CachedSequences(
        plan_layout(tiny_layout_request(budget_bytes=60_000, expected_average_seq_length=16)), num_lanes=20
    )
    per_turn = []
    for turn in range(12):
        moved = cached.cache.num_slabs_moved
        lengths = [128] * 3 if turn % 2 else [12] * 12
        lanes = [lane for lane, length in enumerate(lengths) if fill(cached, lane, length, first=turn)]
        assert len(lanes) == len(lengths)
        for lane in range(len(lengths)):
            cached.cache.close(lane)
            cached.ends.pop(lane)
        per_turn.append(cached.cache.num_slabs_moved - moved)
    # Both kinds of turn fit at once: after the first of each the slabs lie where either has enough.
    assert sum(per_turn[:2]) > 0
    assert sum(per_turn[2:]) == 0


def test_turns_that_do_not_fit_at_once_move_what_they_lack_and_no_more() -> None:
    cached = CachedSequences(
        plan_layout(tiny_layout_request(budget_bytes=30_000, expected_average_seq_length=16)), num_lanes=20
    )
    total = sum(slabs(cached))
    per_turn = []
    for turn in range(12):
        before, moved = slabs(cached), cached.cache.num_slabs_moved
        for lane in range(20):
            if not fill(cached, lane, 128 if turn % 2 else 12, first=turn):
                break
        net = abs(slabs(cached)[GLOBAL] - before[GLOBAL])
        per_turn.append((cached.cache.num_slabs_moved - moved, net))
        for lane in list(cached.ends):
            cached.cache.close(lane)
            cached.ends.pop(lane)
    assert all(moves == net for moves, net in per_turn), "a slab went back and forth within a turn"
    assert any(net for _, net in per_turn)
    assert all(net < total for _, net in per_turn)
