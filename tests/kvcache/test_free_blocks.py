"""Which free block is next, against a model that sorts them all."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hkv_jax.kvcache.free_blocks import FreeBlocks

BLOCKS_PER_SLAB = 4
NUM_SLABS = 6
NUM_BLOCKS = BLOCKS_PER_SLAB * NUM_SLABS


def next_of(members: set[int]) -> int:
    """The lowest id of the slab with the fewest members, the lowest such slab."""
    counts = Counter(block // BLOCKS_PER_SLAB for block in members)
    return min(members, key=lambda block: (counts[block // BLOCKS_PER_SLAB], block))


@pytest.mark.parametrize("seed", range(4))
def test_blocks_come_in_the_order_of_the_model(seed: int) -> None:
    rng = np.random.default_rng(seed)
    free, members = FreeBlocks(BLOCKS_PER_SLAB, NUM_SLABS), set[int]()
    for _ in range(3000):
        act = rng.random()
        block = int(rng.integers(NUM_BLOCKS))
        if act < 0.45 and block not in members:
            free.add(block)
            members.add(block)
        elif act < 0.6 and block in members:
            free.remove(block)
            members.remove(block)
        elif act > 0.6 and members:
            expected = next_of(members)
            assert free.pop() == expected
            members.remove(expected)
        assert len(free) == len(members)
        assert (block in free) == (block in members)
    assert set(free) == members
    assert [free.pop() for _ in range(len(free))] == drained(members)


def drained(members: set[int]) -> list[int]:
    left, order = set(members), []
    while left:
        order.append(next_of(left))
        left.remove(order[-1])
    return order


def test_one_that_left_and_came_back_is_there_once() -> None:
    free = FreeBlocks(4, 1)
    for _ in range(3):
        free.add(2)
        free.remove(2)
    free.add(2)
    free.add(3)
    assert [free.pop(), free.pop()] == [2, 3]
    assert len(free) == 0


def test_stale_entries_do_not_pile_up() -> None:
    free = FreeBlocks(8, 2)
    for block in range(16):
        free.add(block)
    for turn in range(4000):
        # Always out of the middle, so that nothing surfaces at the top of a heap.
        free.remove(15 - turn % 8)
        free.add(15 - turn % 8)
    assert len(free._keys) + sum(map(len, free._ids)) < 300
