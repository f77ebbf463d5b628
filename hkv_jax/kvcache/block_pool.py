"""The blocks of one group: which are free, and how many tables hold each of the others.

Owns: free ids and reference counts, by slab. Must never: know sequences, positions or bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks of one group. Block ``slab * blocks_per_slab + index`` lies in that slab of the arena.

    A block is taken from the fullest slab that has a free one (ties: the lowest slab), and there the lowest id: used
    blocks crowd together, so that whole slabs come free, and the order is a function of the calls alone.

    Invariants. P1: free + held blocks are exactly those of the pool's slabs, none twice. P2: the count of a block is
    the number of tables that hold it (the owner of the tables checks this). P3: free ids are distinct.
    """

    def __init__(self, blocks_per_slab: int, num_slabs: int, slabs: Iterable[int]) -> None:
        """``num_slabs`` is that of the arena, ``slabs`` are the pool's at start."""
        if blocks_per_slab < 1:
            raise ValueError(f"blocks_per_slab must be at least 1, is {blocks_per_slab}")
        self.blocks_per_slab = blocks_per_slab
        self._num_arena_slabs = num_slabs
        self._references = [0] * (num_slabs * blocks_per_slab)
        self._free: dict[int, list[int]] = {}
        # Keys ``free count * num_slabs + slab``; every slab with a free block has its current key here, older ones (all
        # smaller, since a count only grows until the slab is at the top) are dropped when they surface.
        self._fullest: list[int] = []
        self.num_free = 0
        self.num_used = 0
        self.peak_used = 0
        for slab in slabs:
            self.add_slab(slab)

    @property
    def num_blocks(self) -> int:
        """Blocks of all the pool's slabs, free and used."""
        return self.num_free + self.num_used

    @property
    def slabs(self) -> tuple[int, ...]:
        """The pool's slabs, ascending."""
        return tuple(sorted(self._free))

    def references(self, block: int) -> int:
        """How many tables hold ``block``."""
        return self._references[block]

    def allocate(self, count: int) -> list[int] | None:
        """Takes ``count`` free blocks, each with one reference, or nothing (``None``) when there are fewer."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            slab = self._fullest_slab()
            free = self._free[slab]
            block = heapq.heappop(free)
            if free:
                heapq.heapreplace(self._fullest, len(free) * self._num_arena_slabs + slab)
            else:
                heapq.heappop(self._fullest)
            self._references[block] = 1
            blocks.append(block)
        self.num_free -= count
        self.num_used += count
        self.peak_used = max(self.peak_used, self.num_used)
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each of ``blocks``, which must be held already."""
        for block in blocks:
            assert self._references[block] > 0, f"P2: block {block} is free and cannot be shared"
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drops a reference to each of ``blocks``; those that nobody holds any more are free."""
        references = self._references
        for block in blocks:
            assert references[block] > 0, f"P2: block {block} is free and was released again"
            references[block] -= 1
            if not references[block]:
                self._put_back(block)

    def add_slab(self, slab: int) -> None:
        """Adds the blocks of ``slab``, all of them free.

        Raises:
            ValueError: the pool has it, or the arena does not.
        """
        if not 0 <= slab < self._num_arena_slabs:
            raise ValueError(f"slab {slab} is not one of {self._num_arena_slabs}")
        if slab in self._free:
            raise ValueError(f"slab {slab} is in the pool already")
        first = slab * self.blocks_per_slab
        self._free[slab] = list(range(first, first + self.blocks_per_slab))
        self.num_free += self.blocks_per_slab
        heapq.heappush(self._fullest, self.blocks_per_slab * self._num_arena_slabs + slab)

    def take_slab(self) -> int | None:
        """Gives up the highest slab without a used block; ``None`` when every slab has one."""
        slab = max((slab for slab, free in self._free.items() if len(free) == self.blocks_per_slab), default=None)
        if slab is None:
            return None
        del self._free[slab]
        self.num_free -= self.blocks_per_slab
        # Rebuilt, so that no key of this stay is taken for a current one if the slab ever comes back.
        self._fullest = [len(free) * self._num_arena_slabs + slab for slab, free in self._free.items() if free]
        heapq.heapify(self._fullest)
        return slab

    def check_invariants(self, held: Sequence[int] | None = None) -> None:
        """Asserts P1 and P3, and P2 against ``held``: every held block, once a holder."""
        free = [block for blocks in self._free.values() for block in blocks]
        used = [block for block, count in enumerate(self._references) if count]
        owned = {slab * self.blocks_per_slab + i for slab in self._free for i in range(self.blocks_per_slab)}
        assert len(free) == len(set(free)), "P3: a free id is listed twice"
        assert set(free).isdisjoint(used), "P1: a block is free and used"
        assert set(free) | set(used) == owned, "P1: free and used blocks are not those of the slabs"
        assert self.num_free == len(free) and self.num_used == len(used), "P1: the counts are wrong"
        assert all(count >= 0 for count in self._references), "P2: a count is negative"
        if held is not None:
            counts = [0] * len(self._references)
            for block in held:
                counts[block] += 1
            assert counts == self._references, "P2: reference counts differ from the tables that hold the blocks"

    def _fullest_slab(self) -> int:
        while True:
            count, slab = divmod(self._fullest[0], self._num_arena_slabs)
            if len(self._free[slab]) == count:
                return slab
            heapq.heappop(self._fullest)

    def _put_back(self, block: int) -> None:
        slab = block // self.blocks_per_slab
        free = self._free[slab]
        heapq.heappush(free, block)
        heapq.heappush(self._fullest, len(free) * self._num_arena_slabs + slab)
        self.num_free += 1
        self.num_used -= 1
