"""Sharing a prompt between lanes, and going back within a lane."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hkv_jax.kvcache.layout import plan_layout
from hkv_jax.kvcache.manager import CacheManager, Fork
from hkv_jax.testing.cache_layouts import tiny_layout_request

GLOBAL, SLIDING = 0, 1


def make(length: int, taken: bool = True, **changes: Any) -> CacheManager:
    """Blocks of 8 and 4 tokens, window 16; lane 0 holds ``length`` tokens, whose table updates were ``taken``."""
    cache = CacheManager(plan_layout(tiny_layout_request(**changes)), 4)
    cache.open(0)
    assert cache.extend(0, 0, length)
    if taken:
        for group in (GLOBAL, SLIDING):
            cache.take_table_updates(group)
    return cache


def used(cache: CacheManager) -> list[int]:
    return [pool.used_blocks for pool in cache.stats()]


def test_full_blocks_are_shared_and_partial_ones_copied() -> None:
    cache = make(14)
    assert used(cache) == [2, 4]
    fork = cache.fork(0, 2, 14)
    assert fork is not None
    assert (fork.source, fork.target) == (0, 2)
    assert used(cache) == [3, 5]
    rows = [[cache.table_row(group, lane) for lane in (0, 2)] for group in (GLOBAL, SLIDING)]
    for group, full in ((GLOBAL, 1), (SLIDING, 3)):
        source, target = rows[group]
        assert source[:full].tolist() == target[:full].tolist()
        assert fork.copies[group] == (group, source[full], target[full])
        assert source[full] != target[full]
        assert cache.take_table_updates(group).tolist() == [[2, full, target[full]]]
    for lane in (0, 2):
        assert cache.extend(lane, 14, 15)
    slots = [cache.decode_slots(g, np.array([0, 2], np.int32), np.array([14, 14], np.int32)) for g in (GLOBAL, SLIDING)]
    assert all(a != b for a, b in slots)
    cache.check_invariants()
    cache.close(0)
    assert used(cache) == [2, 4]
    cache.close(2)
    assert used(cache) == [0, 0]
    cache.check_invariants()


def test_tokens_that_end_a_block_need_no_copy() -> None:
    cache = make(16)
    assert cache.fork(0, 1, 16) == Fork(0, 1, ())
    assert used(cache) == [2, 4]
    assert cache.fork(0, 2, 16) is not None
    for lane in range(3):
        assert cache.extend(lane, 16, 17)
    assert used(cache) == [5, 7]
    cache.check_invariants()


def test_a_partial_block_of_one_group_only() -> None:
    cache = make(12)
    fork = cache.fork(0, 1, 12)
    assert fork is not None
    assert [copy[0] for copy in fork.copies] == [GLOBAL]


def test_a_fork_shares_only_the_window_of_a_sliding_group() -> None:
    cache = make(32)
    assert cache.extend(0, 32, 40)
    for group in (GLOBAL, SLIDING):
        cache.take_table_updates(group)
    # Position 40 attends to 25 and later; the lane still holds what its chunk, from 32 on, needed.
    held = used(cache)
    assert cache.fork(0, 1, 40) is not None
    assert used(cache) == held
    cache.close(0)
    assert used(cache) == [5, 4]


def test_no_tokens_to_share() -> None:
    cache = CacheManager(plan_layout(tiny_layout_request()), 2)
    cache.open(0)
    assert cache.fork(0, 1, 0) == Fork(0, 1, ())
    assert cache.extend(1, 0, 1)
    cache.check_invariants()


def test_a_fork_without_a_block_for_the_copy_changes_nothing() -> None:
    cache = make(7, budget_bytes=22_000, expected_average_seq_length=16, partition="static")
    blocks = cache.layout.groups[GLOBAL].num_blocks
    cache.open(1)
    assert cache.extend(1, 0, 8 * (blocks - 1))
    before = used(cache)
    assert cache.fork(0, 2, 7) is None
    assert used(cache) == before
    cache.check_invariants()
    cache.open(2)


def test_forks_out_of_order_are_refused() -> None:
    cache = make(14, taken=False)
    with pytest.raises(ValueError, match="fork of lane 0 before its table updates were taken"):
        cache.fork(0, 1, 14)
    for group in (GLOBAL, SLIDING):
        cache.take_table_updates(group)
    with pytest.raises(ValueError, match="cannot go back to 17 tokens: the table reaches 16"):
        cache.fork(0, 1, 17)
    cache.open(1)
    with pytest.raises(ValueError, match="lane 1 is open already"):
        cache.fork(0, 1, 14)
    assert used(cache) == [2, 4]


def test_a_block_begun_in_this_plan_does_not_stop_a_fork() -> None:
    cache = make(16)
    assert cache.extend(0, 16, 17)
    assert cache.fork(0, 1, 16) is not None
    assert [len(cache.take_table_updates(group)) for group in (GLOBAL, SLIDING)] == [1, 1]


def test_truncate_returns_what_held_only_dropped_tokens() -> None:
    cache = make(15)
    assert used(cache) == [2, 4]
    cache.truncate(0, 13)
    assert used(cache) == [2, 4]
    cache.truncate(0, 8)
    assert used(cache) == [1, 2]
    assert cache.watermarks[0] == 8
    assert cache.extend(0, 8, 9)
    cache.truncate(0, 5)
    assert cache.extend(0, 5, 6)
    cache.truncate(0, 0)
    assert used(cache) == [0, 0]
    assert cache.extend(0, 0, 20)
    cache.check_invariants()


def test_truncate_to_nothing_begins_again() -> None:
    cache = make(32)
    assert cache.extend(0, 32, 60)
    cache.truncate(0, 0)
    assert used(cache) == [0, 0]
    assert cache.watermarks[0] == 0
    assert cache.extend(0, 0, 20)
    assert used(cache) == [3, 4]
    cache.truncate(0, 19)
    cache.check_invariants()


def test_truncate_cannot_bring_a_window_back() -> None:
    cache = make(32)
    assert cache.extend(0, 32, 33)
    cache.truncate(0, 32)
    # Position 20 attends to 5 and later, which never entered the pool.
    with pytest.raises(ValueError, match="cannot go back to 20 tokens: the window before them was not kept"):
        cache.truncate(0, 20)
    # Truncated to 32 or not, nothing has changed: the lane goes on.
    assert cache.extend(0, 32, 33)
    cache.check_invariants()


def test_truncate_refuses_tokens_the_chunk_did_not_write() -> None:
    cache = make(5)
    assert cache.extend(0, 5, 23)
    # The chunk kept what position 23 attends to, 8 and later; position 22 attends to 7, of a block held since before.
    with pytest.raises(ValueError, match="cannot go back to 22 tokens: the window before them was not kept"):
        cache.truncate(0, 22)
    cache.truncate(0, 23)


def test_truncate_refuses_a_window_whose_columns_were_taken() -> None:
    cache = make(15)
    # The ring has 5 columns: block 5, of positions 20 to 23, takes that of block 0, which position 18 attends to.
    assert cache.extend(0, 15, 18)
    assert cache.extend(0, 18, 21)
    with pytest.raises(ValueError, match="cannot go back to 18 tokens: the device's table has moved past"):
        cache.truncate(0, 18)
    cache.truncate(0, 19)


def test_truncate_refuses_to_write_into_a_shared_block() -> None:
    cache = make(16)
    assert cache.fork(0, 1, 16) is not None
    with pytest.raises(ValueError, match="cannot truncate to 13 tokens: the block they end in is shared"):
        cache.truncate(1, 13)
    cache.truncate(1, 8)
    cache.close(0)
    cache.check_invariants()


def test_a_fork_of_a_lane_that_decoded_unreported() -> None:
    cache = make(9)
    # Up to 12 tokens no block was needed, so the cache was not told; it is by the fork.
    assert cache.watermarks[0] == 12
    assert cache.fork(0, 1, 12) is not None
    cache.check_invariants()
