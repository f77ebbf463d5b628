"""The KV cache as the scheduler sees it: lanes that get room in every group, or in none.

Owns: the groups of all lanes, all-or-nothing extension, forks, watermarks. Must never: decide who waits or is
preempted; a shortage of blocks is a return value.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.kvcache.slabs import SlabMap


@dataclasses.dataclass(frozen=True, slots=True)
class Fork:
    """Lane ``target`` takes over the state of lane ``source``, its table rows included.

    ``copies`` are (group, source page, target page): the partial block of each group, pages of layer 0. The entry of
    the copied block also comes as a table update of ``target``.
    """

    source: int
    target: int
    copies: tuple[tuple[int, int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PoolStats:
    """One group's pool now: counts of blocks since start, ``block_size`` in tokens, ``block_bytes`` on one chip."""

    name: str
    num_blocks: int
    used_blocks: int
    peak_used_blocks: int
    released_early_blocks: int
    block_bytes: int
    block_size: int


class CacheManager:
    """All groups of all lanes.

    ``watermarks`` i64[num_lanes]: a decode step that ends at or below its lane's needs no ``extend``.

    Invariants. A1, P1-P3, T1-T3: see ``SlabMap``, ``BlockPool``, ``BlockTable``. M1: ``extend`` gives room in all
    groups or in none. M2: a closed lane holds nothing. M3: in a sliding group a lane holds at most
    ``most_window_blocks`` blocks.
    """

    def __init__(self, layout: KVLayout, num_lanes: int) -> None:
        """Every block is free and every one of the ``num_lanes`` lanes closed."""
        self.layout = layout
        self._groups = [GroupCache(group, layout.arenas[group.arena].num_slabs, num_lanes) for group in layout.groups]
        self._slab_maps = [_slab_map(layout, arena) for arena in range(len(layout.arenas))]
        self._open = [False] * num_lanes
        self.watermarks = np.zeros(num_lanes, np.int64)

    def open(self, lane: int) -> None:
        """Takes an unused lane.

        Raises:
            ValueError: it is open.
        """
        if self._open[lane]:
            raise ValueError(f"lane {lane} is open already")
        self._open[lane] = True

    def close(self, lane: int) -> None:
        """Gives the lane and all its blocks back.

        Raises:
            ValueError: it is not open.
        """
        self._require_open(lane)
        for group in self._groups:
            group.clear(lane)
        self._open[lane] = False
        self._refresh(lane)

    def extend(self, lane: int, start: int, end: int) -> bool:
        """Releases what left the window of position ``start``, then makes room for tokens ``[start, end)``.

        Returns False, with no room made in any group, where one lacks blocks; what was released stays released.

        Raises:
            ValueError: the chunk is empty, or does not follow what the lane holds.
        """
        self._require_open(lane)
        tables = [group.tables[lane] for group in self._groups]
        if not start < end or any(not table.end <= start <= table.capacity for table in tables):
            raise ValueError(f"lane {lane}: [{start}, {end}) does not follow the {tables[0].end} tokens it holds")
        enough = True
        for group in self._groups:
            group.release_window(lane, start)
            enough = enough and group.num_missing(lane, end) <= group.pool.num_free
        if enough:
            for group in self._groups:
                group.grow(lane, start, end)
        self._refresh(lane)
        return enough

    def fork(self, source: int, target: int, num_tokens: int) -> Fork | None:
        """Opens ``target`` with the first ``num_tokens`` tokens of ``source``: full blocks shared, the partial copied.

        Returns None, with ``target`` still closed, where a group lacks the block for the copy.

        Raises:
            ValueError: ``target`` is open, ``source`` does not hold the tokens (and the window before them), or its
                table updates of an earlier plan were not taken yet.
        """
        self._require_open(source)
        for group in self._groups:
            group.check_fork(source, num_tokens)
        if any(num_tokens % group.block_size and not group.pool.num_free for group in self._groups):
            return None
        self.open(target)
        copies = []
        for index, group in enumerate(self._groups):
            copy = group.share(source, target, num_tokens)
            if copy is not None:
                copies.append((index, *copy))
        self._refresh(target)
        return Fork(source, target, tuple(copies))

    def truncate(self, lane: int, num_tokens: int) -> None:
        """Forgets the lane's tokens from position ``num_tokens`` on, and returns the blocks that held only those.

        Raises:
            ValueError: the lane does not reach so far, the window before ``num_tokens`` was released or has left the
                device's table, or the block they end in is shared.
        """
        self._require_open(lane)
        for group in self._groups:
            group.check_truncate(lane, num_tokens)
        for group in self._groups:
            group.truncate(lane, num_tokens)
        self._refresh(lane)

    def write_slots(self, group: int, lane: int, start: int, end: int) -> NDArray[np.int32]:
        """Token slots i32[end - start] of layer 0 for the chunk ``[start, end)``, or ``NO_SLOT``; after ``extend``."""
        return self._groups[group].write_slots(lane, start, end)

    def decode_slots(self, group: int, lanes: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Token slots i32[n] of layer 0 for one token a lane; after ``extend`` wherever the watermark asked for it."""
        return self._groups[group].decode_slots(lanes, positions)

    def take_table_updates(self, group: int) -> NDArray[np.int32]:
        """Entries of the device's tables that changed since the last call: i32[n, 3] of (lane, column, page).

        No (lane, column) occurs twice; entries of lanes closed meanwhile are left out.
        """
        return self._groups[group].take_updates()

    def table_row(self, group: int, lane: int) -> NDArray[np.int32]:
        """The device's row i32[table_width] of a lane once all its updates are applied; 0 where no block is held."""
        return self._groups[group].table_row(lane)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of that many tokens can ever be held, were it alone."""
        return num_tokens <= self.layout.max_model_len and all(
            group.layout.blocks_of_sequence(num_tokens) <= group.pool.num_blocks for group in self._groups
        )

    def has_room(self, num_tokens: int) -> bool:
        """Whether a new lane could compute a sequence of that many tokens with the blocks that are free now."""
        return all(group.layout.blocks_of_sequence(num_tokens) <= group.pool.num_free for group in self._groups)

    def hand_over_slab(self, source: int, target: int) -> bool:
        """Moves a slab without a used block from group ``source`` to group ``target``.

        Returns False where ``source`` has none, or is at its reserve.

        Raises:
            ValueError: the groups do not share an arena.
        """
        arena = self.layout.groups[source].arena
        if source == target or arena != self.layout.groups[target].arena:
            raise ValueError(f"groups {source} and {target} do not exchange slabs")
        slabs = self._slab_maps[arena]
        if not slabs.can_take(source):
            return False
        slab = self._groups[source].pool.take_slab()
        if slab is None:
            return False
        slabs.take(slab, source)
        slabs.give(slab, target)
        self._groups[target].pool.add_slab(slab)
        return True

    def stats(self) -> tuple[PoolStats, ...]:
        """One entry a group, in the layout's order."""
        return tuple(
            PoolStats(
                name=group.layout.spec.name,
                num_blocks=group.pool.num_blocks,
                used_blocks=group.pool.num_used,
                peak_used_blocks=group.pool.peak_used,
                released_early_blocks=group.num_released_early,
                block_bytes=group.layout.format.block_bytes,
                block_size=group.block_size,
            )
            for group in self._groups
        )

    def check_invariants(self) -> None:
        """Asserts every invariant of the package; linear in the number of blocks, for tests and debugging."""
        open_lanes = [lane for lane, is_open in enumerate(self._open) if is_open]
        for slabs in self._slab_maps:
            slabs.check_invariants()
        for index, group in enumerate(self._groups):
            slabs = self._slab_maps[self.layout.groups[index].arena]
            assert slabs.slabs_of(index) == group.pool.slabs, "A1: the pool's slabs are not those of the map"
            group.check_invariants(open_lanes)
        for lane, watermark in enumerate(self.watermarks):
            assert watermark == self._watermark(lane), f"lane {lane} has an old watermark"

    def _require_open(self, lane: int) -> None:
        if not self._open[lane]:
            raise ValueError(f"lane {lane} is not open")

    def _watermark(self, lane: int) -> int:
        return min(group.tables[lane].decode_end for group in self._groups) if self._open[lane] else 0

    def _refresh(self, lane: int) -> None:
        self.watermarks[lane] = self._watermark(lane)


def _slab_map(layout: KVLayout, arena: int) -> SlabMap:
    groups = {index: group for index, group in enumerate(layout.groups) if group.arena == arena}
    return SlabMap(
        layout.arenas[arena].num_slabs,
        {index: group.initial_slabs for index, group in groups.items()},
        {index: group.reserve_slabs for index, group in groups.items()},
    )
