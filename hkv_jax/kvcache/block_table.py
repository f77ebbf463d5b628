"""The blocks of one sequence in one group.

Owns: which block number of the sequence is which block of the pool, and when a block leaves the window. Must never:
know other sequences, pages or the device's table. It holds ids; taking and returning them is up to the caller.
"""

from __future__ import annotations

from collections.abc import Iterable

HOLE = -1
"""The id of a block whose tokens never enter the pool: the window had passed it within its own chunk."""


def first_live_block(num_tokens: int, window: int | None, block_size: int) -> int:
    """The lowest block number that position ``num_tokens`` or a later one can still attend to."""
    return 0 if window is None else max(0, num_tokens - window + 1) // block_size


class BlockTable:
    """Ids of the block numbers ``first_block ..``; block number n covers positions ``[n*P, (n+1)*P)``.

    ``start`` and ``end`` are the chunk last extended to. Decode steps that need neither a block nor a release go
    unreported, so tokens up to ``capacity`` may be there. ``reach`` is one past the highest block number ever held.
    ``lost`` are the positions of that chunk whose K/V went nowhere. K/V of positions below ``cached_end`` was there
    before and is not written again. ``first_kept`` is the lowest block number of the chunk that has memory.

    Invariants. T1: ``len(ids) == ceil(max(end, cached_end) / P) - first_block``. T2: a released block is removed from
    the table, never overwritten. Holes occur in sliding groups only.
    """

    __slots__ = (
        "block_size", "cached_end", "end", "first_block", "first_kept", "ids", "lost", "reach", "start", "window"
    )  # fmt: skip

    def __init__(self, block_size: int, window: int | None) -> None:
        """``block_size`` P and ``window`` W in tokens; W is ``None`` in a global group."""
        self.block_size = block_size
        self.window = window
        self.first_block = 0
        self.ids: list[int] = []
        self.start = 0
        self.end = 0
        self.lost = range(0)
        self.reach = 0
        self.cached_end = 0
        self.first_kept = 0

    def load(self, start: int, ids: list[int], cached_end: int) -> None:
        """Begins an empty table at position ``start`` with cached blocks.

        In a global group ``ids`` are all blocks below ``cached_end``; in a sliding one those before ``start``, or none.
        """
        self.start = self.end = start
        self.ids = list(ids)
        if self.window is None:
            self.cached_end = cached_end
        else:
            self.first_block = start // self.block_size - len(ids)
        self.reach = self.first_block + len(ids)

    @property
    def capacity(self) -> int:
        """Tokens the table's blocks reach up to, a multiple of P."""
        return (self.first_block + len(self.ids)) * self.block_size

    @property
    def decode_end(self) -> int:
        """A decode step whose token ends at or below it needs no new block and releases none."""
        capacity = (self.first_block + len(self.ids)) * self.block_size
        if self.window is None:
            return capacity
        return min(capacity, (self.first_block + 1) * self.block_size + self.window - 1)

    def first_live(self, num_tokens: int) -> int:
        """The lowest block number that position ``num_tokens`` or a later one can still attend to."""
        return first_live_block(num_tokens, self.window, self.block_size)

    def held(self) -> list[int]:
        """The ids, holes left out."""
        return [block for block in self.ids if block != HOLE]

    def id_of(self, number: int) -> int:
        """Id of block ``number``, ``HOLE`` where the table holds none."""
        index = number - self.first_block
        return self.ids[index] if 0 <= index < len(self.ids) else HOLE

    def release_below(self, number: int) -> list[int]:
        """Removes the blocks below ``number`` (at most the table's end); returns their ids, holes left out."""
        count = number - self.first_block
        if count <= 0:
            return []
        released = [block for block in self.ids[:count] if block != HOLE]
        del self.ids[:count]
        self.first_block = number
        return released

    def num_missing(self, end: int, keep_from: int) -> int:
        """Blocks the table lacks for tokens up to ``end``.

        Those that no position from ``keep_from`` (at most ``end``) on can attend to are left out.
        """
        next_number = self.first_block + len(self.ids)
        return max(0, -(-end // self.block_size) - max(next_number, self.first_live(keep_from)))

    def extend(self, start: int, end: int, keep_from: int, blocks: Iterable[int]) -> None:
        """Appends holes and then ``blocks``, as many as ``num_missing`` said, for the chunk ``[start, end)``.

        An empty table needs no holes: it begins at the first block that stays.
        """
        next_number = self.first_block + len(self.ids)
        self.first_kept = self.first_live(keep_from)
        num_holes = min(self.first_kept, -(-end // self.block_size)) - next_number
        if num_holes > 0 and self.ids:
            self.ids.extend([HOLE] * num_holes)
        elif num_holes > 0:
            self.first_block += num_holes
        self.ids.extend(blocks)
        self.start, self.end = start, end
        self.lost = range(start, self.first_kept * self.block_size)
        self.reach = max(self.reach, self.first_block + len(self.ids))

    def is_whole(self, number: int) -> bool:
        """Whether the last chunk wrote all that it had for block ``number``: it may hold tokens of the chunk before."""
        size = self.block_size
        return max(self.lost.start, number * size) >= min(self.lost.stop, (number + 1) * size)

    def check_return(self, num_tokens: int) -> None:
        """Raises ``ValueError`` where the sequence could not go on from its first ``num_tokens`` tokens."""
        if num_tokens > self.capacity:
            raise ValueError(f"cannot go back to {num_tokens} tokens: the table reaches {self.capacity}")
        first = self.first_live(num_tokens)
        oldest = 0 if self.window is None else num_tokens - self.window + 1
        lost = max(oldest, self.lost.start) < min(num_tokens, self.lost.stop)
        if lost or not self.holds(first, -(-num_tokens // self.block_size)):
            raise ValueError(f"cannot go back to {num_tokens} tokens: the window before them was not kept")

    def truncate(self, num_tokens: int) -> list[int]:
        """Drops the blocks at and above ``ceil(num_tokens / P)``; returns their ids, holes left out."""
        self.check_return(num_tokens)
        num_blocks = -(-num_tokens // self.block_size)
        kept = max(0, num_blocks - self.first_block)
        dropped = [block for block in self.ids[kept:] if block != HOLE]
        del self.ids[kept:]
        self.first_block = min(self.first_block, num_blocks)
        if not num_tokens:
            self.reach = 0
        self.end = num_tokens
        self.start = min(self.start, num_tokens)
        self.cached_end = min(self.cached_end, num_tokens)
        return dropped

    def holds(self, first: int, stop: int) -> bool:
        """Whether every block number of ``[first, stop)`` is in the table and not a hole."""
        if first >= stop:
            return True
        low, high = first - self.first_block, stop - self.first_block
        return low >= 0 and high <= len(self.ids) and HOLE not in self.ids[low:high]

    def check_invariants(self) -> None:
        """Asserts T1 and that holes are where they may be."""
        assert self.start <= self.end, "T1: the last chunk ends before it starts"
        end = max(self.end, self.cached_end)
        assert len(self.ids) == -(-end // self.block_size) - self.first_block, "T1: wrong number of blocks"
        holes = [self.first_block + i for i, block in enumerate(self.ids) if block == HOLE]
        assert not holes or self.window is not None, "T1: a hole in a global group"
        assert all(number < self.first_live(self.end) for number in holes), "T1: a hole inside the window"
        held = self.held()
        assert len(held) == len(set(held)), "T3: a table holds a block twice"
