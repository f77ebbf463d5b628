"""A pool against a brutally simple model, rule by rule."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hkv_jax.kvcache.block_pool import BlockPool

BLOCKS_PER_SLAB = 3
ARENA_SLABS = 5


class PoolMachine(RuleBasedStateMachine):
    """Holders are lists of blocks; the model knows the slabs and counts holders."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS_PER_SLAB, ARENA_SLABS, [0, 1, 3])
        self.slabs = {0, 1, 3}
        self.holders: list[list[int]] = []
        self.peak = 0

    def held(self) -> Counter[int]:
        return Counter(block for holder in self.holders for block in holder)

    def free_in(self, slab: int) -> list[int]:
        held = self.held()
        return [b for b in range(slab * BLOCKS_PER_SLAB, (slab + 1) * BLOCKS_PER_SLAB) if not held[b]]

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        free = {slab: self.free_in(slab) for slab in self.slabs}
        blocks = self.pool.allocate(count)
        if count > sum(map(len, free.values())):
            assert blocks is None
            return
        expected = []
        for _ in range(count):
            slab = min((s for s in free if free[s]), key=lambda s: (len(free[s]), s))
            expected.append(free[slab].pop(0))
        assert blocks == expected
        self.holders.append(expected)
        self.peak = max(self.peak, len(self.held()))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.pool.retain(holder)
        self.holders.append(list(holder))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(index))

    @precondition(lambda self: len(self.slabs) < ARENA_SLABS)
    @rule(data=st.data())
    def add_slab(self, data: st.DataObject) -> None:
        slab = data.draw(st.sampled_from(sorted(set(range(ARENA_SLABS)) - self.slabs)))
        self.pool.add_slab(slab)
        self.slabs.add(slab)

    @rule()
    def take_slab(self) -> None:
        empty = [slab for slab in self.slabs if len(self.free_in(slab)) == BLOCKS_PER_SLAB]
        taken = self.pool.take_slab()
        assert taken == max(empty, default=None)
        self.slabs.discard(-1 if taken is None else taken)

    @invariant()
    def agrees(self) -> None:
        held = self.held()
        self.pool.check_invariants(list(held.elements()))
        assert self.pool.slabs == tuple(sorted(self.slabs))
        assert self.pool.num_held == len(held)
        assert self.pool.num_blocks == len(self.slabs) * BLOCKS_PER_SLAB
        assert self.pool.peak_held == self.peak
        assert all(self.pool.references(block) == count for block, count in held.items())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40)


def test_blocks_crowd_into_the_fullest_slab() -> None:
    pool = BlockPool(3, 3, [0, 1, 2])
    blocks = pool.allocate(7)
    assert blocks == [0, 1, 2, 3, 4, 5, 6]
    pool.release([1, 3, 4])
    # Slab 0 has one free block, slabs 1 and 2 have two.
    assert pool.allocate(3) == [1, 3, 4]
    pool.release([6])
    assert pool.take_slab() == 2
    assert pool.allocate(1) is None


def test_a_double_free_is_an_assertion() -> None:
    pool = BlockPool(2, 1, [0])
    blocks = pool.allocate(1)
    assert blocks == [0]
    pool.release([0])
    with pytest.raises(AssertionError, match="block 0 is free and was released again"):
        pool.release([0])
    with pytest.raises(AssertionError, match="block 1 is free and cannot be shared"):
        pool.retain([1])


def test_a_count_that_no_table_explains_is_noticed() -> None:
    pool = BlockPool(2, 1, [0])
    pool.allocate(2)
    with pytest.raises(AssertionError, match="P2"):
        pool.check_invariants([0])


def test_misuse_is_refused() -> None:
    pool = BlockPool(2, 2, [0])
    with pytest.raises(ValueError, match="slab 0 is in the pool already"):
        pool.add_slab(0)
    with pytest.raises(ValueError, match="slab 2 is not one of 2"):
        pool.add_slab(2)
    with pytest.raises(ValueError, match="blocks_per_slab must be at least 1"):
        BlockPool(0, 1, [])


def test_stale_entries_do_not_pile_up() -> None:
    pool = BlockPool(4, 4, range(4))
    for _ in range(500):
        blocks = pool.allocate(11)
        assert blocks is not None
        pool.release(blocks)
    assert len(pool._fullest) <= pool.num_blocks
