"""One group's side of the cache: its pool, the tables of all lanes, and what the device's tables must learn.

Owns: taking and returning blocks for tables, pages, slots and table updates of one group. Must never: decide whether
there is room (``CacheManager`` does, for all groups at once).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from hkv_jax.kvcache.block_pool import BlockPool
from hkv_jax.kvcache.block_table import HOLE, BlockTable, first_live_block
from hkv_jax.kvcache.format import NO_SLOT
from hkv_jax.kvcache.layout import GroupLayout, most_window_blocks


class GroupCache:
    """Blocks of one group.

    Every change of a table is also a change of the device's: ``updates`` maps ``lane * table_width + column`` to a
    page, the last writer of a column wins.
    """

    def __init__(self, layout: GroupLayout, num_arena_slabs: int, num_lanes: int) -> None:
        """An empty pool over the group's initial slabs and an empty table for each of ``num_lanes`` lanes."""
        self.layout = layout
        self.pool = BlockPool(layout.blocks_per_slab, num_arena_slabs, layout.initial_slabs)
        self.block_size = layout.format.block_size
        self.window = layout.spec.window
        self.width = layout.table_width
        self.tables = [BlockTable(self.block_size, layout.spec.window) for _ in range(num_lanes)]
        self.num_released_early = 0
        self._updates: dict[int, int] = {}
        # Page of the block that the lane's next decode step writes to, HOLE where there is none.
        self._current_pages = np.full(num_lanes, HOLE, np.int32)

    def first_live(self, num_tokens: int) -> int:
        """The lowest block number that position ``num_tokens`` or a later one can still attend to."""
        return first_live_block(num_tokens, self.window, self.block_size)

    def release_window(self, lane: int, start: int) -> bool:
        """Returns the blocks that no position from ``start`` on attends to; whether the prefix cache keeps any."""
        table = self.tables[lane]
        released = table.release_below(table.first_live(start))
        if released:
            self.pool.release(released)
            self.num_released_early += len(released)
        return any(self.pool.keeps(block) for block in released)

    def num_missing(self, lane: int, end: int, keep_from: int) -> int:
        """Blocks to allocate before tokens up to ``end`` have room, and the window before ``keep_from`` stays."""
        return self.tables[lane].num_missing(end, keep_from)

    def grow(self, lane: int, start: int, end: int, keep_from: int) -> None:
        """Gives the lane room for the chunk ``[start, end)``; there must be enough free blocks."""
        table = self.tables[lane]
        missing = table.num_missing(end, keep_from)
        table.extend(start, end, keep_from, self._take(missing))
        # What of the chunk only a later request will read has no place in the device's ring.
        stop = table.first_block + len(table.ids)
        for number in range(stop - min(missing, self.width), stop):
            self._updates[lane * self.width + number % self.width] = self.layout.page(table.id_of(number))
        self._refresh_page(lane)

    def load(self, lane: int, start: int, blocks: list[int], cached_end: int) -> None:
        """Begins the lane at position ``start`` with cached ``blocks``; the device gets them as a whole row."""
        self.pool.retain(blocks)
        self.tables[lane].load(start, blocks, cached_end)
        self._refresh_page(lane)

    def replace(self, lane: int, number: int, block: int) -> None:
        """Takes a cached block in place of the lane's own full block with the same tokens; its K/V is not written."""
        table = self.tables[lane]
        index = number - table.first_block
        self.pool.retain([block])
        self.pool.release([table.ids[index]])
        table.ids[index] = block
        table.cached_end = max(table.cached_end, (number + 1) * self.block_size)
        self._updates[lane * self.width + number % self.width] = self.layout.page(block)
        self._refresh_page(lane)

    def rename(self, lanes: Iterable[int], moved: Mapping[int, int]) -> list[int]:
        """Blocks have new ids, by their old ones; returns those of ``lanes`` whose tables changed.

        The device is not told entry by entry: it takes whole rows before its next step, and entries that it had yet to
        be told of are in them.
        """
        changed = []
        for lane in lanes:
            ids = self.tables[lane].ids
            if not moved.keys().isdisjoint(ids):
                self.tables[lane].ids = [moved.get(block, block) for block in ids]
                self._forget_updates(lane)
                self._refresh_page(lane)
                changed.append(lane)
        return changed

    def check_return(self, lane: int, num_tokens: int) -> None:
        """Raises ``ValueError`` where the lane's first ``num_tokens`` tokens alone are no longer all here."""
        table = self.tables[lane]
        table.check_return(num_tokens)
        if num_tokens and table.reach - self.width > table.first_live(num_tokens):
            raise ValueError(f"cannot go back to {num_tokens} tokens: the device's table has moved past their window")

    def check_truncate(self, lane: int, num_tokens: int) -> None:
        """Raises ``ValueError`` where the lane cannot go on from its first ``num_tokens`` tokens."""
        self.check_return(lane, num_tokens)
        last = self.tables[lane].id_of(num_tokens // self.block_size)
        if num_tokens % self.block_size and self.pool.references(last) > 1:
            raise ValueError(f"cannot truncate to {num_tokens} tokens: the block they end in is shared")

    def truncate(self, lane: int, num_tokens: int) -> None:
        """Returns the blocks at and above ``ceil(num_tokens / P)``."""
        self.pool.release(self.tables[lane].truncate(num_tokens))
        self._refresh_page(lane)

    def clear(self, lane: int) -> None:
        """Returns every block of the lane and forgets what the device was to learn about it."""
        self.pool.release(self.tables[lane].held())
        self.tables[lane] = BlockTable(self.block_size, self.layout.spec.window)
        self._forget_updates(lane)
        self._refresh_page(lane)

    def check_fork(self, source: int, num_tokens: int) -> None:
        """Raises ``ValueError`` where the first ``num_tokens`` tokens of ``source`` cannot be shared now.

        The device copies the source's table row before it applies this step's updates: entries that it has not been
        told of yet would be missing in the copy.
        """
        self.check_return(source, num_tokens)
        if self._updates:
            table = self.tables[source]
            first, stop = table.first_live(num_tokens), -(-num_tokens // self.block_size)
            pages = {self.layout.page(table.id_of(number)) for number in range(first, stop)}
            low, high = source * self.width, (source + 1) * self.width
            if any(low <= key < high and page in pages for key, page in self._updates.items()):
                raise ValueError(f"fork of lane {source} before its table updates were taken")

    def share(self, source: int, target: int, num_tokens: int) -> tuple[int, int] | None:
        """Lets ``target`` hold the first ``num_tokens`` tokens of ``source``; full blocks are shared by reference.

        Returns (source page, target page) of the partial block to be copied, ``None`` where the tokens end a block.
        """
        table, other = self.tables[source], self.tables[target]
        first, full = table.first_live(num_tokens), num_tokens // self.block_size
        other.first_block = first
        shared = [table.id_of(number) for number in range(first, full)]
        self.pool.retain(shared)
        other.ids.extend(shared)
        other.start = other.end = num_tokens
        if table.end < num_tokens:  # it got there by decode steps that went unreported
            table.start = table.end = num_tokens
        copy = None
        if num_tokens % self.block_size:
            block = self._take(1)[0]
            other.ids.append(block)
            copy = (self.layout.page(table.id_of(full)), self.layout.page(block))
            self._updates[target * self.width + full % self.width] = copy[1]
        self._refresh_page(target)
        return copy

    def write_slots(self, lane: int, start: int, end: int) -> NDArray[np.int32]:
        """Slots i32[end - start] of layer 0 for a chunk's tokens; ``NO_SLOT`` where the chunk outruns the window."""
        table, size = self.tables[lane], self.block_size
        first, stop = start // size, -(-end // size)
        ids = np.full(stop - first, HOLE, np.int64)
        kept = max(first, table.first_kept)
        ids[kept - first :] = table.ids[kept - table.first_block : stop - table.first_block]
        ids[: max(0, table.cached_end // size - first)] = HOLE
        bases = np.where(ids == HOLE, 0, self.layout.pages(ids).astype(np.int64) * size)
        slots = bases[:, None] + np.arange(size)
        slots[ids == HOLE] = NO_SLOT
        return slots.reshape(-1)[start - first * size : end - first * size].astype(np.int32)

    def decode_slots(self, lanes: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Slots i32[n] of layer 0 for one token a lane."""
        pages = self._current_pages[lanes]
        slots = pages * self.block_size + positions % self.block_size
        return np.where(pages == HOLE, NO_SLOT, slots).astype(np.int32, copy=False)

    @property
    def num_updates(self) -> int:
        """Entries that ``take_updates`` would return."""
        return len(self._updates)

    def take_updates(self) -> NDArray[np.int32]:
        """The changed table entries since the last call, i32[n, 3]: lane, column, page."""
        count = len(self._updates)
        rows = np.empty((count, 3), np.int32)
        keys = np.fromiter(self._updates, np.int64, count)
        rows[:, 0], rows[:, 1] = np.divmod(keys, self.width)
        rows[:, 2] = np.fromiter(self._updates.values(), np.int64, count)
        self._updates.clear()
        return rows

    def table_row(self, lane: int) -> NDArray[np.int32]:
        """The lane's table i32[table_width] once every update is applied; 0 where it holds no block."""
        table = self.tables[lane]
        row = np.zeros(self.width, np.int32)
        ids = np.array(table.ids[-self.width :], np.int64)
        columns = (table.first_block + len(table.ids) - len(ids) + np.arange(len(ids))) % self.width
        live = ids != HOLE
        row[columns[live]] = self.layout.pages(ids[live])
        return row

    def check_invariants(self, open_lanes: list[int]) -> None:
        """Asserts P1-P3, T1, T3, M2 and M3 for this group."""
        self.pool.check_invariants([block for table in self.tables for block in table.held()])
        shared: dict[int, tuple[int, bool]] = {}  # its number, and whether a holder is known to have filled it
        for lane, table in enumerate(self.tables):
            table.check_invariants()
            assert lane in open_lanes or not table.ids, f"M2: closed lane {lane} holds blocks"
            if table.window is not None:
                most = most_window_blocks(table.window, self.block_size, table.end - table.start)
                most += max(0, table.first_live(table.end) - table.first_kept)
                assert len(table.held()) <= most, f"M3: lane {lane} holds more than {most} blocks"
            for index, block in enumerate(table.ids):
                if block != HOLE and self.pool.references(block) > 1:
                    number = table.first_block + index
                    known, full = shared.get(block, (number, False))
                    assert known == number, "T3: one block, two block numbers"
                    shared[block] = number, full or (number + 1) * self.block_size <= max(table.end, table.cached_end)
        assert all(full for _, full in shared.values()), "T3: a shared block is not full"

    def _take(self, count: int) -> list[int]:
        blocks = self.pool.allocate(count) if count else []
        assert blocks is not None, f"M1: {count} blocks of {self.layout.spec.name} were promised"
        return blocks

    def _forget_updates(self, lane: int) -> None:
        low, high = lane * self.width, (lane + 1) * self.width
        self._updates = {key: page for key, page in self._updates.items() if not low <= key < high}

    def _refresh_page(self, lane: int) -> None:
        table = self.tables[lane]
        last = table.ids[-1] if table.ids else HOLE
        self._current_pages[lane] = HOLE if last == HOLE else self.layout.page(last)
