"""Free blocks of a pool, by slab.

Owns: which of them is taken next. Must never: know what a block holds.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator


class FreeBlocks:
    """Ids of free blocks. Block ``slab * blocks_per_slab + index`` lies in that slab of the arena.

    The next block comes from the slab that has the fewest (ties: the lowest slab), and there it is the lowest id: used
    blocks crowd together, so that whole slabs come free, and the order is a function of the calls alone.
    """

    def __init__(self, blocks_per_slab: int, num_slabs: int) -> None:
        self._blocks_per_slab = blocks_per_slab
        self._num_slabs = num_slabs
        self._members: set[int] = set()
        self._counts = [0] * num_slabs
        # Ids of each slab as a heap, and keys ``count * num_slabs + slab``; entries that no longer hold are dropped
        # when they surface.
        self._ids: list[list[int]] = [[] for _ in range(num_slabs)]
        self._keys: list[int] = []

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, block: int) -> bool:
        return block in self._members

    def __iter__(self) -> Iterator[int]:
        return iter(self._members)

    def add(self, block: int) -> None:
        """Adds a block that is not there."""
        slab = block // self._blocks_per_slab
        self._members.add(block)
        heapq.heappush(self._ids[slab], block)
        self._recount(slab, 1)

    def remove(self, block: int) -> None:
        """Takes out a given block."""
        self._members.remove(block)
        self._recount(block // self._blocks_per_slab, -1)

    def pop(self) -> int:
        """Takes the next block; there must be one."""
        keys, counts, members = self._keys, self._counts, self._members
        while True:
            count, slab = divmod(keys[0], self._num_slabs)
            if count and counts[slab] == count:
                break
            heapq.heappop(keys)
        ids = self._ids[slab]
        block = heapq.heappop(ids)
        while block not in members:
            block = heapq.heappop(ids)
        # A block that left and came back is listed twice.
        while ids and ids[0] == block:
            heapq.heappop(ids)
        members.remove(block)
        self._recount(slab, -1)
        return block

    def _recount(self, slab: int, change: int) -> None:
        count = self._counts[slab] + change
        self._counts[slab] = count
        if count:
            heapq.heappush(self._keys, count * self._num_slabs + slab)
            if len(self._keys) > 8 * self._num_slabs + 64:
                self._compact()
        else:
            self._ids[slab].clear()

    def _compact(self) -> None:
        counts = self._counts
        self._keys = [count * self._num_slabs + slab for slab, count in enumerate(counts) if count]
        heapq.heapify(self._keys)
        for slab, ids in enumerate(self._ids):
            if len(ids) > counts[slab]:
                self._ids[slab] = sorted({block for block in ids if block in self._members})
