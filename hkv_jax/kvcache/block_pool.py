"""The blocks of one group: who holds each, and which may be taken for something new.

Owns: reference counts, keeps, names and free blocks, by slab. Must never: know sequences, positions or bytes, or which
cached block is worth more than another.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence

from hkv_jax.kvcache.free_blocks import FreeBlocks


class BlockPool:
    """Blocks of one group. Block ``slab * blocks_per_slab + index`` lies in that slab of the arena.

    A block is *held* by tables (references), *kept* by the prefix cache, or free. It may have a *name*: the prefix
    cache knows what its tokens are. A free block with a name is *loose*: it can still be found and held again, until it
    is taken for something new; blank ones are taken first.

    Invariants. P1: free + cached (kept, not held) + held blocks are exactly those of the pool's slabs, none twice. P2:
    references and keeps of a block are the tables and the parts of the prefix cache that hold it (their owners check
    this). P3: free ids are distinct, and blank or loose as their names say.
    """

    def __init__(self, blocks_per_slab: int, num_slabs: int, slabs: Iterable[int]) -> None:
        """``num_slabs`` is that of the arena, ``slabs`` are the pool's at start."""
        if blocks_per_slab < 1:
            raise ValueError(f"blocks_per_slab must be at least 1, is {blocks_per_slab}")
        self.blocks_per_slab = blocks_per_slab
        self._num_arena_slabs = num_slabs
        num_ids = num_slabs * blocks_per_slab
        self._references = [0] * num_ids
        self._keeps = [0] * num_ids
        self._named = bytearray(num_ids)
        self._blank = FreeBlocks(blocks_per_slab, num_slabs)
        self._loose = FreeBlocks(blocks_per_slab, num_slabs)
        self._slabs: set[int] = set()
        self._busy = [0] * num_slabs  # held or kept blocks of each slab
        self._idle_slabs: set[int] = set()  # slabs of the pool without a busy block
        self._highest_idle: list[int] = []  # their negatives as a heap; those that are idle no more are passed over
        self.num_held = 0
        self.num_cached = 0
        self.peak_held = 0
        self.on_forget: Callable[[int], None] = _nobody_listens
        for slab in slabs:
            self.add_slab(slab)

    @property
    def num_blocks(self) -> int:
        """Blocks of all the pool's slabs."""
        return len(self._slabs) * self.blocks_per_slab

    @property
    def num_ids(self) -> int:
        """Blocks the arena would hold if all its slabs were the pool's; ids are below it."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated; names of loose ones are lost thereby."""
        return len(self._blank) + len(self._loose)

    @property
    def num_loose(self) -> int:
        """Free blocks that can still be found by name."""
        return len(self._loose)

    @property
    def num_idle_slabs(self) -> int:
        """Slabs all of whose blocks are free."""
        return len(self._idle_slabs)

    @property
    def slabs(self) -> tuple[int, ...]:
        """The pool's slabs, ascending."""
        return tuple(sorted(self._slabs))

    def references(self, block: int) -> int:
        """How many tables hold ``block``."""
        return self._references[block]

    def keeps(self, block: int) -> int:
        """How many parts of the prefix cache keep ``block``."""
        return self._keeps[block]

    def has_name(self, block: int) -> bool:
        """Whether the prefix cache knows what ``block`` holds."""
        return bool(self._named[block])

    def allocate(self, count: int) -> list[int] | None:
        """Takes ``count`` free blocks, each with one reference, or nothing (``None``) when there are fewer."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            block = self._take_free()
            self._references[block] = 1
            self._make_busy(block)
            self._count_held()
            blocks.append(block)
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each of ``blocks``, which must be held, kept or loose."""
        references = self._references
        for block in blocks:
            references[block] += 1
            if references[block] == 1:
                if self._keeps[block]:
                    self.num_cached -= 1
                else:
                    assert block in self._loose, f"P2: block {block} is blank and cannot be shared"
                    self._loose.remove(block)
                    self._make_busy(block)
                self._count_held()

    def release(self, blocks: Iterable[int]) -> None:
        """Drops a reference to each of ``blocks``; those that nobody holds or keeps any more are free."""
        references = self._references
        for block in blocks:
            assert references[block] > 0, f"P2: block {block} is not held and was released again"
            references[block] -= 1
            if not references[block]:
                self.num_held -= 1
                if self._keeps[block]:
                    self.num_cached += 1
                else:
                    self._free(block)

    def keep(self, blocks: Iterable[int]) -> None:
        """Has the prefix cache keep each of ``blocks`` once more; they must have names."""
        for block in blocks:
            assert self._named[block], f"P2: block {block} has no name and cannot be kept"
            self._keeps[block] += 1
            if self._keeps[block] == 1 and not self._references[block]:
                self._loose.remove(block)
                self._make_busy(block)
                self.num_cached += 1

    def unkeep(self, blocks: Iterable[int]) -> None:
        """Undoes one ``keep`` of each of ``blocks``."""
        for block in blocks:
            assert self._keeps[block] > 0, f"P2: block {block} is not kept"
            self._keeps[block] -= 1
            if not self._keeps[block] and not self._references[block]:
                self.num_cached -= 1
                self._free(block)

    def name(self, block: int) -> None:
        """Notes that the prefix cache knows a held block's tokens."""
        assert self._references[block] > 0, f"block {block} is not held and cannot be named"
        self._named[block] = 1

    def unname(self, block: int) -> None:
        """Forgets a block's name; a loose one is blank from now on."""
        if self._named[block]:
            self._named[block] = 0
            if block in self._loose:
                self._loose.remove(block)
                self._blank.add(block)

    def add_slab(self, slab: int) -> None:
        """Adds the blocks of ``slab``, all of them blank.

        Raises:
            ValueError: the pool has it, or the arena does not.
        """
        if not 0 <= slab < self._num_arena_slabs:
            raise ValueError(f"slab {slab} is not one of {self._num_arena_slabs}")
        if slab in self._slabs:
            raise ValueError(f"slab {slab} is in the pool already")
        self._slabs.add(slab)
        self._make_idle(slab)
        for block in self._blocks_of(slab):
            self._blank.add(block)

    def take_slab(self) -> int | None:
        """Gives up the highest slab whose blocks are all free; ``None`` when every slab has a busy one."""
        if not self._idle_slabs:
            return None
        while -self._highest_idle[0] not in self._idle_slabs:
            heapq.heappop(self._highest_idle)
        slab = -heapq.heappop(self._highest_idle)
        for block in self._blocks_of(slab):
            if self._named[block]:
                self._named[block] = 0
                self._loose.remove(block)
                self._blank.add(block)
                self.on_forget(block)
        for block in self._blocks_of(slab):
            self._blank.remove(block)
        self._idle_slabs.remove(slab)
        self._slabs.remove(slab)
        return slab

    def emptiest_slab(self) -> tuple[int, int] | None:
        """The slab with fewest busy blocks, and how many those are; ``None`` for a pool without slabs."""
        if not self._slabs:
            return None
        slab = min(self._slabs, key=lambda slab: (self._busy[slab], slab))
        return slab, self._busy[slab]

    def vacate(self, slab: int) -> list[tuple[int, int]]:
        """Gives up ``slab``; its busy blocks get new ids elsewhere, for which there must be free blocks.

        Returns (old id, new id) of each; references, keeps and names go along.
        """
        for block in self._blocks_of(slab):
            if block in self._loose:
                self._named[block] = 0
                self._loose.remove(block)
                self._blank.add(block)
                self.on_forget(block)
        busy = []
        for block in self._blocks_of(slab):
            if block in self._blank:
                self._blank.remove(block)
            else:
                busy.append(block)
        moves = []
        for block in busy:
            target = self._take_free()
            self._references[target], self._keeps[target] = self._references[block], self._keeps[block]
            self._named[target] = self._named[block]
            self._references[block] = self._keeps[block] = self._named[block] = 0
            self._make_busy(target)
            moves.append((block, target))
        self._busy[slab] = 0
        self._idle_slabs.discard(slab)
        self._slabs.remove(slab)
        return moves

    def check_invariants(self, held: Sequence[int] | None = None) -> None:
        """Asserts P1 and P3, and P2 against ``held``: every held block, once a holder."""
        owned = {block for slab in self._slabs for block in self._blocks_of(slab)}
        free = set(self._blank) | set(self._loose)
        busy = {block for block in owned if self._references[block] or self._keeps[block]}
        assert set(self._blank).isdisjoint(self._loose), "P3: a block is blank and loose"
        assert free.isdisjoint(busy), "P1: a block is free and used"
        assert free | busy == owned, "P1: free and used blocks are not those of the slabs"
        assert all(self._named[block] for block in self._loose), "P3: a loose block has no name"
        assert not any(self._named[block] for block in self._blank), "P3: a blank block has a name"
        num_held = sum(self._references[block] > 0 for block in owned)
        assert self.num_held == num_held and self.num_cached == len(busy) - num_held, "P1: the counts are wrong"
        for slab in self._slabs:
            blocks = self._blocks_of(slab)
            assert self._busy[slab] == sum(block in busy for block in blocks), "P1: a slab's busy blocks are miscounted"
            assert (slab in self._idle_slabs) == (not self._busy[slab]), "P1: a slab is idle and busy"
        if held is not None:
            counts = [0] * len(self._references)
            for block in held:
                counts[block] += 1
            assert counts == self._references, "P2: reference counts differ from the tables that hold the blocks"

    def _blocks_of(self, slab: int) -> range:
        return range(slab * self.blocks_per_slab, (slab + 1) * self.blocks_per_slab)

    def _take_free(self) -> int:
        if self._blank:
            return self._blank.pop()
        block = self._loose.pop()
        self._named[block] = 0
        # May turn further loose blocks blank: what follows a forgotten block cannot be found any more.
        self.on_forget(block)
        return block

    def _make_idle(self, slab: int) -> None:
        self._idle_slabs.add(slab)
        heapq.heappush(self._highest_idle, -slab)
        if len(self._highest_idle) > 4 * len(self._idle_slabs) + 64:
            self._highest_idle = sorted(-idle for idle in self._idle_slabs)

    def _make_busy(self, block: int) -> None:
        slab = block // self.blocks_per_slab
        self._busy[slab] += 1
        if self._busy[slab] == 1:
            self._idle_slabs.remove(slab)

    def _count_held(self) -> None:
        self.num_held += 1
        if self.num_held > self.peak_held:
            self.peak_held = self.num_held

    def _free(self, block: int) -> None:
        slab = block // self.blocks_per_slab
        self._busy[slab] -= 1
        if not self._busy[slab]:
            self._make_idle(slab)
        (self._loose if self._named[block] else self._blank).add(block)


def _nobody_listens(_block: int) -> None:
    """Blocks without names are never forgotten."""
