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
    """Holders and keepers are lists of blocks; the model knows slabs and names, and counts.

    Whoever forgets block b forgets b + 1 as well, if nobody uses it, as a prefix takes what follows it along.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS_PER_SLAB, ARENA_SLABS, [0, 1, 3])
        self.pool.on_forget = self.forget
        self.slabs = {0, 1, 3}
        self.holders: list[list[int]] = []
        self.keepers: list[list[int]] = []
        self.named: set[int] = set()
        self.forgotten: list[int] = []
        self.peak = 0

    def forget(self, block: int) -> None:
        self.forgotten.append(block)
        if block + 1 in self.named and not self.is_busy(block + 1):
            self.pool.unname(block + 1)

    def held(self) -> Counter[int]:
        return Counter(block for holder in self.holders for block in holder)

    def kept(self) -> Counter[int]:
        return Counter(block for keeper in self.keepers for block in keeper)

    def is_busy(self, block: int) -> bool:
        return any(block in blocks for blocks in self.holders + self.keepers)

    def blocks_of(self, slab: int) -> range:
        return range(slab * BLOCKS_PER_SLAB, (slab + 1) * BLOCKS_PER_SLAB)

    def free(self) -> set[int]:
        return {block for slab in self.slabs for block in self.blocks_of(slab) if not self.is_busy(block)}

    def next_of(self, blocks: set[int]) -> int:
        """The lowest block of the slab that has the fewest of ``blocks``."""
        counts = Counter(block // BLOCKS_PER_SLAB for block in blocks)
        return min(blocks, key=lambda block: (counts[block // BLOCKS_PER_SLAB], block))

    def lose_name(self, block: int, taken: set[int]) -> list[int]:
        """What is forgotten when ``block`` is, in the model; ``taken`` are no longer free."""
        self.named.discard(block)
        if block + 1 in self.named and not self.is_busy(block + 1) and block + 1 not in taken:
            self.named.discard(block + 1)
        return [block]

    @rule(count=st.integers(0, 7), names=st.booleans())
    def allocate(self, count: int, names: bool) -> None:
        free, expected, forgotten = self.free(), list[int](), list[int]()
        self.forgotten = []
        if count > len(free):
            assert self.pool.allocate(count) is None
            assert self.forgotten == []
            return
        named = set(self.named)
        blocks = self.pool.allocate(count)
        for _ in range(count):
            block = self.next_of(free - self.named or free)
            if block in self.named:
                forgotten += self.lose_name(block, set(expected))
            free.remove(block)
            expected.append(block)
        assert blocks == expected
        assert self.forgotten == forgotten
        assert set(forgotten) <= named
        self.holders.append(expected)
        self.peak = max(self.peak, len(self.held()))
        for block in expected if names else ():
            self.pool.name(block)
            self.named.add(block)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.pool.retain(holder)
        self.holders.append(list(holder))

    @precondition(lambda self: self.findable())
    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        """A loose or kept block is held again."""
        blocks = data.draw(st.lists(st.sampled_from(self.findable()), min_size=1, max_size=3, unique=True))
        self.pool.retain(blocks)
        self.holders.append(blocks)
        self.peak = max(self.peak, len(self.held()))

    def findable(self) -> list[int]:
        return sorted(self.named & self.free() | set(self.kept()))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(index))

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.held())))
        self.pool.name(block)
        self.named.add(block)

    @precondition(lambda self: self.named - set(self.kept()))
    @rule(data=st.data())
    def unname(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.named - set(self.kept()))))
        self.pool.unname(block)
        self.named.discard(block)

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.named)), min_size=1, max_size=3, unique=True))
        self.pool.keep(blocks)
        self.keepers.append(blocks)

    @precondition(lambda self: self.keepers)
    @rule(data=st.data())
    def unkeep(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.keepers) - 1))
        self.pool.unkeep(self.keepers.pop(index))

    @precondition(lambda self: len(self.slabs) < ARENA_SLABS)
    @rule(data=st.data())
    def add_slab(self, data: st.DataObject) -> None:
        slab = data.draw(st.sampled_from(sorted(set(range(ARENA_SLABS)) - self.slabs)))
        self.pool.add_slab(slab)
        self.slabs.add(slab)

    @rule()
    def take_slab(self) -> None:
        idle = [slab for slab in self.slabs if not any(map(self.is_busy, self.blocks_of(slab)))]
        assert self.pool.num_idle_slabs == len(idle)
        self.forgotten = []
        taken = self.pool.take_slab()
        assert taken == max(idle, default=None)
        forgotten: list[int] = []
        if taken is not None:
            for block in self.blocks_of(taken):
                if block in self.named:
                    forgotten += self.lose_name(block, set())
            self.slabs.discard(taken)
        assert self.forgotten == forgotten

    @invariant()
    def agrees(self) -> None:
        held, kept, free = self.held(), self.kept(), self.free()
        self.pool.check_invariants(list(held.elements()))
        assert self.pool.slabs == tuple(sorted(self.slabs))
        assert self.pool.num_blocks == len(self.slabs) * BLOCKS_PER_SLAB
        assert (self.pool.num_held, self.pool.num_free) == (len(held), len(free))
        assert self.pool.num_cached == len(kept.keys() - held.keys())
        assert self.pool.num_loose == len(free & self.named)
        assert self.pool.peak_held == self.peak
        for block in range(self.pool.num_ids):
            assert self.pool.references(block) == held[block]
            assert self.pool.keeps(block) == kept[block]
            assert self.pool.has_name(block) == (block in self.named)


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


def test_what_nobody_can_find_is_taken_first() -> None:
    pool = BlockPool(2, 2, [0, 1])
    assert pool.allocate(4) == [0, 1, 2, 3]
    for block in (0, 3):
        pool.name(block)
    pool.release([0, 1, 2, 3])
    assert (pool.num_free, pool.num_loose) == (4, 2)
    forgotten: list[int] = []
    pool.on_forget = forgotten.append
    assert pool.allocate(2) == [1, 2]
    assert forgotten == []
    assert pool.allocate(1) == [0]
    assert forgotten == [0]
    assert not pool.has_name(0)


def test_what_is_kept_is_cached_and_never_taken() -> None:
    pool = BlockPool(2, 1, [0])
    pool.allocate(2)
    pool.name(1)
    pool.keep([1])
    pool.release([0, 1])
    assert (pool.num_held, pool.num_cached, pool.num_free) == (0, 1, 1)
    assert pool.num_idle_slabs == 0
    assert pool.take_slab() is None
    assert pool.allocate(2) is None
    pool.retain([1])
    assert (pool.num_held, pool.num_cached, pool.num_free) == (1, 0, 1)
    pool.unkeep([1])
    pool.release([1])
    assert (pool.num_cached, pool.num_loose, pool.num_free) == (0, 1, 2)
    assert pool.take_slab() == 0


def test_a_double_free_is_an_assertion() -> None:
    pool = BlockPool(2, 1, [0])
    blocks = pool.allocate(1)
    assert blocks == [0]
    pool.release([0])
    with pytest.raises(AssertionError, match="block 0 is not held and was released again"):
        pool.release([0])
    with pytest.raises(AssertionError, match="block 1 is blank and cannot be shared"):
        pool.retain([1])


def test_what_has_no_name_is_not_kept_and_what_nobody_holds_gets_none() -> None:
    pool = BlockPool(2, 1, [0])
    pool.allocate(1)
    with pytest.raises(AssertionError, match="block 0 has no name and cannot be kept"):
        pool.keep([0])
    with pytest.raises(AssertionError, match="block 1 is not held and cannot be named"):
        pool.name(1)
    with pytest.raises(AssertionError, match="block 0 is not kept"):
        pool.unkeep([0])


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
