"""The cache's promises one at a time: early release, the window bound, all or nothing, slots and misuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.layout import most_window_blocks, plan_layout
from hkv_jax.kvcache.manager import CacheManager
from hkv_jax.testing.cache_layouts import tiny_group, tiny_layout_request

GLOBAL, SLIDING = 0, 1


def make(num_lanes: int = 4, **changes: Any) -> CacheManager:
    return CacheManager(plan_layout(tiny_layout_request(**changes)), num_lanes)


def make_window(window: int, block_size: int, max_chunk: int = 1) -> CacheManager:
    """One sliding group alone, with room for 4,096 tokens of one lane."""
    groups = (tiny_group(window),)
    sizes = {"sliding": block_size}
    request = {"groups": groups, "block_sizes": sizes, "max_model_len": 4096, "max_chunk": max_chunk}
    cache = make(1, **request, budget_bytes=2**16)
    cache.open(0)
    return cache


def used(cache: CacheManager) -> list[int]:
    return [pool.used_blocks for pool in cache.stats()]


@pytest.mark.parametrize("block_size", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("prompt", [1, 90])
def test_a_long_generation_holds_only_its_window(block_size: int, prompt: int) -> None:
    changes = {"block_sizes": {"global": 32, "sliding": block_size}, "budget_bytes": 2**20, "max_chunk": 1}
    cache = make(1, max_model_len=4096, **changes)
    cache.open(0)
    most = -(-15 // block_size) + 1
    for position in range(prompt + 4000):
        if position + 1 > cache.watermarks[0]:
            assert cache.extend(0, position, position + 1)
        assert used(cache)[SLIDING] <= most
    everything, window = cache.stats()
    total = prompt + 4000
    assert everything.peak_used_blocks == everything.used_blocks == -(-total // 32)
    assert everything.released_early_blocks == 0
    assert window.peak_used_blocks <= most
    assert window.released_early_blocks == -(-total // block_size) - window.used_blocks
    cache.close(0)
    assert used(cache) == [0, 0]
    assert cache.stats()[SLIDING].released_early_blocks == window.released_early_blocks


@settings(max_examples=150)
@given(
    window=st.integers(1, 70),
    block_size=st.sampled_from([1, 2, 4, 16]),
    chunks=st.lists(st.integers(1, 100), min_size=1, max_size=12),
)
def test_chunks_hold_the_old_window_and_the_new(window: int, block_size: int, chunks: list[int]) -> None:
    cache = make_window(window, block_size, max_chunk=100)
    start = 0
    for length in chunks:
        assert cache.extend(0, start, start + length)
        held = used(cache)[0]
        assert held <= most_window_blocks(window, block_size, length)
        assert held <= cache.layout.groups[0].floor_blocks
        start += length
        cache.check_invariants()


@settings(max_examples=150)
@given(
    window=st.integers(2, 40),
    block_size=st.sampled_from([1, 2, 4, 16]),
    prompt=st.integers(1, 90),
    steps=st.integers(1, 150),
)
def test_watermark_is_where_extending_token_by_token_first_does_something(
    window: int, block_size: int, prompt: int, steps: int
) -> None:
    naive, lazy = (make_window(window, block_size, max_chunk=90) for _ in range(2))
    assert naive.extend(0, 0, prompt)
    assert lazy.extend(0, 0, prompt)
    asked = 0
    for position in range(prompt, prompt + steps):
        before = naive.stats(), naive.table_row(0, 0).tolist()
        assert naive.extend(0, position, position + 1)
        changed = (naive.stats(), naive.table_row(0, 0).tolist()) != before
        if position + 1 > lazy.watermarks[0]:
            assert lazy.extend(0, position, position + 1)
            asked += 1
            assert changed
        assert lazy.table_row(0, 0).tolist() == naive.table_row(0, 0).tolist()
        assert lazy.stats() == naive.stats()
        lane, now = np.zeros(1, np.int32), np.array([position], np.int32)
        assert lazy.decode_slots(0, lane, now).tolist() == naive.decode_slots(0, lane, now).tolist()
    assert asked <= 2 * (steps // block_size + 1)


@settings(max_examples=150)
@given(
    window=st.integers(1, 40),
    block_size=st.sampled_from([1, 2, 4, 16]),
    chunks=st.lists(st.integers(1, 60), min_size=1, max_size=30),
)
def test_ring_columns_of_a_window_never_collide(window: int, block_size: int, chunks: list[int]) -> None:
    cache = make_window(window, block_size, max_chunk=60)
    width = cache.layout.groups[0].table_width
    row = np.full(width, -1)
    pages: dict[int, int] = {}
    start = 0
    for length in chunks:
        end = start + length
        assert cache.extend(0, start, end)
        # What this chunk reads is there before its own updates are applied.
        for block in range(max(0, start - window + 1) // block_size, -(-start // block_size)):
            assert row[block % width] == pages[block]
        slots = cache.write_slots(0, 0, start, end)
        for position, slot in enumerate(slots.tolist(), start):
            kept = (position // block_size + 1) * block_size > end - window + 1
            assert (slot != NO_SLOT) == kept
            if kept:
                assert slot % block_size == position % block_size
                assert pages.setdefault(position // block_size, slot // block_size) == slot // block_size
        updates = cache.take_table_updates(0)
        assert len(set(updates[:, 1].tolist())) == len(updates)
        row[updates[:, 1]] = updates[:, 2]
        start = end


def test_room_in_all_groups_or_in_none() -> None:
    # 16 global blocks of 8 tokens, more than enough sliding ones.
    cache = make(2, budget_bytes=22_000, expected_average_seq_length=16, partition="static")
    assert cache.layout.groups[GLOBAL].num_blocks < 20
    cache.open(0)
    cache.open(1)
    assert cache.extend(0, 0, 32)
    assert cache.extend(0, 32, 64)
    assert cache.extend(0, 64, 88)
    before = used(cache)
    updates = [cache.take_table_updates(g) for g in (GLOBAL, SLIDING)]
    assert all(len(update) for update in updates)
    assert not cache.extend(1, 0, 128)
    assert used(cache) == before
    assert cache.watermarks[1] == 0
    assert [len(cache.take_table_updates(g)) for g in (GLOBAL, SLIDING)] == [0, 0]
    cache.check_invariants()
    cache.close(0)
    assert cache.extend(1, 0, 128)


def test_what_left_the_window_stays_released_when_there_is_no_room() -> None:
    cache = make(2, budget_bytes=22_000, expected_average_seq_length=16, partition="static")
    cache.open(0)
    cache.open(1)
    assert cache.extend(0, 0, 32)
    assert cache.extend(1, 0, 8 * (cache.layout.groups[GLOBAL].num_blocks - 4))
    before = used(cache)
    # Position 32 attends to 17 and later: block 4 (16 to 19) on. Chunk [0, 32) kept 17 and later too.
    assert cache.extend(0, 32, 33) is False
    assert used(cache) == before
    cache.close(1)
    assert cache.extend(0, 32, 48)
    cache.open(1)
    assert cache.extend(1, 0, 8 * (cache.layout.groups[GLOBAL].num_blocks - 6))
    held = used(cache)
    assert not cache.extend(0, 48, 64)
    assert used(cache) == [held[GLOBAL], held[SLIDING] - 4]
    cache.check_invariants()


def test_updates_of_a_closed_lane_are_dropped() -> None:
    cache = make(2)
    cache.open(0)
    cache.open(1)
    assert cache.extend(0, 0, 20)
    assert cache.extend(1, 0, 9)
    cache.close(0)
    for group in (GLOBAL, SLIDING):
        assert set(cache.take_table_updates(group)[:, 0].tolist()) == {1}
        assert cache.take_table_updates(group).shape == (0, 3)
    cache.open(0)
    assert cache.extend(0, 0, 3)
    assert cache.take_table_updates(GLOBAL).tolist() == [[0, 0, int(cache.table_row(GLOBAL, 0)[0])]]


def test_decode_slots_of_many_lanes() -> None:
    cache = make(4)
    lengths = [3, 8, 21, 16]
    for lane, length in enumerate(lengths):
        cache.open(lane)
        assert cache.extend(lane, 0, length)
        assert cache.extend(lane, length, length + 1)
    lanes = np.array([2, 0, 3, 1], np.int32)
    positions = np.array([lengths[lane] for lane in lanes], np.int32)
    for group in (GLOBAL, SLIDING):
        slots = cache.decode_slots(group, lanes, positions)
        assert slots.dtype == np.int32
        singles = [
            cache.write_slots(group, int(lane), int(p), int(p) + 1)[0] for lane, p in zip(lanes, positions, strict=True)
        ]
        assert slots.tolist() == singles
        assert len(set(singles)) == 4


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda cache: cache.open(0), "lane 0 is open already"),
        (lambda cache: cache.close(1), "lane 1 is not open"),
        (lambda cache: cache.extend(1, 0, 4), "lane 1 is not open"),
        (lambda cache: cache.extend(0, 10, 10), r"\[10, 10\) does not follow"),
        (lambda cache: cache.extend(0, 9, 12), r"\[9, 12\) does not follow the 10 tokens"),
        (lambda cache: cache.extend(0, 17, 18), r"\[17, 18\) does not follow"),
        (lambda cache: cache.fork(1, 2, 4), "lane 1 is not open"),
        (lambda cache: cache.truncate(0, 20), "cannot go back to 20 tokens: the table reaches"),
    ],
)
def test_misuse_is_refused(act: Any, message: str) -> None:
    cache = make()
    cache.open(0)
    assert cache.extend(0, 0, 10)
    before = used(cache)
    with pytest.raises(ValueError, match=message):
        act(cache)
    assert used(cache) == before
    cache.check_invariants()
