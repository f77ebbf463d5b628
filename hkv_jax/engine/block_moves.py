"""Blocks that the cache moved together, until the device has been told.

Owns: the copies and table rows that the next plan must carry. Must never: import jax, or decide what moves.
"""

from __future__ import annotations

from hkv_jax.engine.draft import Draft
from hkv_jax.engine.lanes import Lanes
from hkv_jax.engine.plan import BlockCopy, LaneTables
from hkv_jax.kvcache.manager import CacheManager


class BlockMoves:
    """What moved since the last plan. A draft may come to nothing: what it would have told stays with the next one."""

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache
        self._copies: list[BlockCopy] = []
        self._lanes: set[int] = set()  # whose tables name moved blocks

    def gather(self, draft: Draft, lanes: Lanes) -> None:
        """Lets the cache move blocks, before anything else is drafted, and drafts all the device does not know."""
        copies, moved = self._cache.gather()
        self._copies += [BlockCopy(*copy) for copy in copies]
        self._lanes.update(moved)
        draft.copies += self._copies
        for lane in sorted(self._lanes):
            if lanes.sequences[lane] is not None:
                draft.table_rows.append(LaneTables(lane, self._cache.table_rows(lane)))

    def clear(self) -> None:
        """A plan tells the device, or the device has lost the blocks."""
        self._copies.clear()
        self._lanes.clear()
