"""The KV cache as the scheduler sees it: lanes that get room in every group, or in none.

Owns: the groups of all lanes, all-or-nothing extension, forks, watermarks. Must never: decide who waits or is
preempted; a shortage of blocks is a return value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hkv_jax.kvcache.boundary import Boundary
from hkv_jax.kvcache.group_cache import GroupCache
from hkv_jax.kvcache.join_point import JoinKind
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.kvcache.policy import CachePolicy
from hkv_jax.kvcache.prefix_cache import PrefixCache
from hkv_jax.kvcache.prefix_match import NO_PREFIX, PrefixPath, PrefixUse
from hkv_jax.kvcache.room import Room
from hkv_jax.kvcache.token_chain import TokenChain


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
    """One group's pool now, in blocks; ``block_size`` in tokens, ``block_bytes`` on one chip.

    ``used_blocks`` are held by running sequences, ``cached_blocks`` are kept for later ones. ``peak_used_blocks`` and
    ``released_early_blocks`` (those that left a window) count since start.
    """

    name: str
    num_blocks: int
    used_blocks: int
    cached_blocks: int
    peak_used_blocks: int
    released_early_blocks: int
    block_bytes: int
    block_size: int


class CacheManager:
    """All groups of all lanes, and what finished sequences left.

    ``watermarks`` i64[num_lanes]: a decode step that ends at or below its lane's needs no ``extend``. ``prefixes`` is
    the prefix cache, ``room`` the forecast by which sequences are admitted.

    Invariants. A1, P1-P3, T1-T3, X1-X3, J1: see ``SlabMap``, ``BlockPool``, ``BlockTable``, ``PrefixTree``,
    ``JoinPoints``. M1: ``extend`` gives room in all groups or in none. M2: a closed lane holds nothing. M3: in a
    sliding group a lane holds at most ``most_window_blocks`` blocks; those for join points in its chunk do not count.
    """

    def __init__(self, layout: KVLayout, num_lanes: int, policy: CachePolicy | None = None) -> None:
        """Every block is free and every one of the ``num_lanes`` lanes closed."""
        self.layout = layout
        self.policy = policy or CachePolicy()
        self._groups = [GroupCache(group, layout.arenas[group.arena].num_slabs, num_lanes) for group in layout.groups]
        self.prefixes = PrefixCache(self._groups, layout.largest_block_size, self.policy)
        self._boundary = Boundary(layout, self._groups, self.prefixes.joins.evict)
        self.room = Room(self._groups, self._boundary, self.prefixes)
        self._open = [False] * num_lanes
        self.copied_bytes = 0
        self.watermarks = np.zeros(num_lanes, np.int64)

    @property
    def num_slabs_moved(self) -> int:
        """Slabs that changed hands since start."""
        return self._boundary.num_slabs_moved

    def gather(self) -> tuple[list[tuple[int, int, int]], list[int]]:
        """Makes room where the last plan lacked it by moving blocks together; before anything else of a plan.

        Returns (group, source page, target page) of the blocks the device must copy, pages of layer 0, and the lanes
        whose ``table_rows`` it must take before its step.
        """
        moves = self._boundary.gather()
        if not moves:
            return [], []
        lanes: set[int] = set()
        copies = []
        open_lanes = [lane for lane, is_open in enumerate(self._open) if is_open]
        for index, group in enumerate(self._groups):
            moved: dict[int, int] = {}
            origins: dict[int, int] = {}
            for number, source, target in moves:
                if number == index:
                    # A block may have come where a later slab was emptied: it moves on, and is copied once.
                    origin = origins.pop(source, source)
                    moved[origin], origins[target] = target, origin
            if moved:
                self.prefixes.rename(index, moved)
                lanes.update(group.rename(open_lanes, moved))
                copies += [(index, group.layout.page(a), group.layout.page(b)) for a, b in moved.items()]
                self.copied_bytes += len(moved) * group.layout.format.block_bytes
        return copies, sorted(lanes)

    def open(self, lane: int, path: PrefixPath | None = None, use: PrefixUse = NO_PREFIX) -> bool:
        """Takes an unused lane, and for it the cached blocks that ``use`` of ``path`` says.

        Those are pinned before anything else is allocated. Returns whether any were loaded: the device then needs the
        lane's whole ``table_row``.

        Raises:
            ValueError: it is open.
        """
        if self._open[lane]:
            raise ValueError(f"lane {lane} is open already")
        self._open[lane] = True
        loaded = self.prefixes.loaded_blocks(path, use) if path is not None else []
        for group, blocks in zip(self._groups, loaded, strict=False):
            group.load(lane, use.start, blocks, use.matched)
        if self.policy.enabled:
            self.prefixes.attach(lane, path, use)
        self._refresh(lane)
        return any(loaded)

    def close(self, lane: int, chain: TokenChain | None = None, num_tokens: int = 0) -> None:
        """Gives the lane and all its blocks back; those of its first ``num_tokens`` tokens can be found again.

        Raises:
            ValueError: it is not open.
        """
        self._require_open(lane)
        joins = []
        if self.policy.enabled:
            if chain is not None:
                self.prefixes.record(lane, chain, num_tokens)
                self.prefixes.join(lane, num_tokens - num_tokens % self.layout.largest_block_size, JoinKind.TURN)
            joins = self.prefixes.detach(lane)
        for group in self._groups:
            group.clear(lane)
        self.prefixes.push(joins)
        self._open[lane] = False
        self._refresh(lane)

    def extend(self, lane: int, start: int, end: int, keep_from: int | None = None) -> bool:
        """Releases what left the window of position ``start``, then makes room for tokens ``[start, end)``.

        Where memory allows, the window before ``keep_from`` stays too, for a join point there. Returns False, with no
        room made in any group, where one lacks blocks; what was released or evicted stays so.

        Raises:
            ValueError: the chunk is empty, or does not follow what the lane holds.
        """
        self._require_open(lane)
        tables = [group.tables[lane] for group in self._groups]
        if not start < end or any(not table.end <= start <= table.capacity for table in tables):
            raise ValueError(f"lane {lane}: [{start}, {end}) does not follow the {tables[0].end} tokens it holds")
        kept = [group.release_window(lane, start) for group in self._groups]
        if any(kept) and self.policy.enabled:
            self.prefixes.note_released(lane, start)
        for keep in dict.fromkeys((end if keep_from is None else min(keep_from, end), end)):
            missing = [group.num_missing(lane, end, keep) for group in self._groups]
            if self._boundary.make_room(missing):
                for group in self._groups:
                    group.grow(lane, start, end, keep)
                self._refresh(lane)
                return True
        self._refresh(lane)
        return False

    def could_gather(self, lane: int, end: int) -> bool:
        """Whether tokens up to ``end``, for which ``extend`` found no room, will have it once blocks are gathered."""
        return self.layout.partition == "moving" and self._boundary.could_hold(
            [group.num_missing(lane, end, end) for group in self._groups]
        )

    def record(self, lane: int, chain: TokenChain, num_tokens: int, joins: Mapping[int, JoinKind]) -> None:
        """The step that computes the lane's first ``num_tokens`` tokens is planned: later ones may find full blocks.

        ``joins`` are the positions, multiples of P_max, where join points are to be.
        """
        if self.policy.enabled:
            self.prefixes.record(lane, chain, num_tokens)
            for position, kind in joins.items():
                self.prefixes.join(lane, position, kind)

    def reset(self) -> None:
        """Every lane is closed, and what the device held is lost: nothing can be found any more."""
        assert not any(self._open), "a lane is still open"
        self.prefixes.clear()

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
        if not self._boundary.make_room([int(num_tokens % group.block_size > 0) for group in self._groups]):
            return None
        self.open(target)
        copies = []
        for index, group in enumerate(self._groups):
            copy = group.share(source, target, num_tokens)
            if copy is not None:
                copies.append((index, *copy))
        if self.policy.enabled:
            self.prefixes.follow(source, target)
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

    def num_table_updates(self) -> tuple[int, ...]:
        """Entries that ``take_table_updates`` would return for each group."""
        return tuple(group.num_updates for group in self._groups)

    def take_table_updates(self, group: int) -> NDArray[np.int32]:
        """Entries of the device's tables that changed since the last call: i32[n, 3] of (lane, column, page).

        No (lane, column) occurs twice; entries of lanes closed meanwhile are left out.
        """
        return self._groups[group].take_updates()

    def table_row(self, group: int, lane: int) -> NDArray[np.int32]:
        """The device's row i32[table_width] of a lane once all its updates are applied; 0 where no block is held."""
        return self._groups[group].table_row(lane)

    def table_rows(self, lane: int) -> tuple[NDArray[np.int32], ...]:
        """``table_row`` of every group."""
        return tuple(group.table_row(lane) for group in self._groups)

    def stats(self) -> tuple[PoolStats, ...]:
        """One entry a group, in the layout's order."""
        return tuple(
            PoolStats(
                name=group.layout.spec.name,
                num_blocks=group.pool.num_blocks,
                used_blocks=group.pool.num_held,
                cached_blocks=group.pool.num_cached,
                peak_used_blocks=group.pool.peak_held,
                released_early_blocks=group.num_released_early,
                block_bytes=group.layout.format.block_bytes,
                block_size=group.block_size,
            )
            for group in self._groups
        )

    def check_invariants(self) -> None:
        """Asserts every invariant of the package; linear in the number of blocks, for tests and debugging."""
        open_lanes = [lane for lane, is_open in enumerate(self._open) if is_open]
        self._boundary.check_invariants()
        self.prefixes.check_invariants()
        for group in self._groups:
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
