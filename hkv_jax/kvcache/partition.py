"""The arithmetic that splits a byte budget into slabs and pools.

Owns: the slab size, how many slabs each group gets, the smallest budget that would do. Must never: know models, windows
or error messages; what does not fit is ``None``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

MAX_CANDIDATES = 65536
"""Slab sizes tried. The largest of them holds so many blocks that what it leaves over no longer counts."""


@dataclasses.dataclass(frozen=True, slots=True)
class PoolNeed:
    """What one group asks for: ``page_bytes`` and ``block_bytes`` on one chip, the rest in blocks.

    ``floor_blocks`` must fit together with those of the other groups; ``reserve_blocks`` are always the group's own;
    ``demand_blocks`` are what a sequence of the expected length takes. Groups of one ``arena`` share its slabs.
    """

    arena: int
    page_bytes: int
    block_bytes: int
    floor_blocks: int
    reserve_blocks: int
    demand_blocks: int


@dataclasses.dataclass(frozen=True, slots=True)
class Partition:
    """Slab size in bytes of each arena, and slabs of each group."""

    slab_bytes: tuple[int, ...]
    group_slabs: tuple[int, ...]


def partition_budget(needs: Sequence[PoolNeed], budget_bytes: int, parts: int) -> Partition | None:
    """Splits the budget; ``None`` where all floors, in whole slabs, exceed one of ``parts`` equal parts of it."""
    slab_bytes = _slab_sizes(needs, budget_bytes, parts)
    if slab_bytes is None:
        return None
    of_group = [slab_bytes[need.arena] for need in needs]
    floors = sum(
        _ceil_div(need.floor_blocks, size // need.block_bytes) * size
        for need, size in zip(needs, of_group, strict=True)
    )
    group_slabs = _split(needs, of_group, budget_bytes)
    if floors * parts > budget_bytes or group_slabs is None:
        return None
    return Partition(tuple(slab_bytes), tuple(group_slabs))


def smallest_budget(needs: Sequence[PoolNeed]) -> int:
    """The smallest budget in bytes that holds every floor."""
    low = sum(need.floor_blocks * need.block_bytes for need in needs) - 1
    high = 2 * (low + 1)
    while partition_budget(needs, high, 1) is None:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if partition_budget(needs, middle, 1) is None:
            low = middle
        else:
            high = middle
    return high


def _slab_sizes(needs: Sequence[PoolNeed], budget: int, parts: int) -> list[int] | None:
    """Slab size of each arena. An arena of several is sized for the bytes its groups would get in whole blocks."""
    arenas = [[need for need in needs if need.arena == arena] for arena in range(1 + max(need.arena for need in needs))]
    if len(arenas) == 1:
        budgets = [budget]
    else:
        blocks = _split(needs, [need.block_bytes for need in needs], budget)
        if blocks is None:
            return None
        budgets = [0] * len(arenas)
        for need, count in zip(needs, blocks, strict=True):
            budgets[need.arena] += count * need.block_bytes
    sizes = []
    for members, share in zip(arenas, budgets, strict=True):
        size = members[0].block_bytes if len(members) == 1 else _shared_slab_size(members, share, parts)
        if size is None:
            return None
        sizes.append(size)
    return sizes


def _shared_slab_size(needs: Sequence[PoolNeed], budget: int, parts: int) -> int | None:
    """The slab size that wastes least: inside slabs, at the arena's end, and half a slab a group that is not full."""
    unit = math.lcm(*(need.page_bytes for need in needs))
    blocks = [need.block_bytes for need in needs]
    first = _ceil_div(max(blocks), unit)
    last = min(math.lcm(*blocks), budget // len(needs)) // unit
    if last < first:
        return None
    slabs = unit * np.arange(first, min(last, first + MAX_CANDIDATES - 1) + 1, dtype=np.int64)
    floors = np.sum([-(-need.floor_blocks // (slabs // need.block_bytes)) for need in needs], axis=0)
    waste = np.max([slabs % block for block in blocks], axis=0) / slabs
    waste = waste + (budget % slabs) / budget + len(needs) * slabs / (2 * budget)
    waste[floors * parts > budget // slabs] = np.inf
    best = int(np.argmin(waste))
    return int(slabs[best]) if np.isfinite(waste[best]) else None


def _split(needs: Sequence[PoolNeed], slab_bytes: Sequence[int], budget: int) -> list[int] | None:
    """Slabs of each group for the most sequences of expected length; what is left goes to whichever group limits."""
    per_slab = [size // need.block_bytes for need, size in zip(needs, slab_bytes, strict=True)]

    def slabs_for(num_sequences: int) -> list[int]:
        wanted = [max(need.reserve_blocks, num_sequences * need.demand_blocks) for need in needs]
        return [_ceil_div(blocks, per) for blocks, per in zip(wanted, per_slab, strict=True)]

    def left_with(counts: Sequence[int]) -> int:
        return budget - sum(count * size for count, size in zip(counts, slab_bytes, strict=True))

    if left_with(slabs_for(0)) < 0:
        return None
    low, high = 0, 1
    while left_with(slabs_for(high)) >= 0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left_with(slabs_for(middle)) >= 0 else (low, middle)
    counts = slabs_for(low)
    left = left_with(counts)
    while fitting := [g for g, size in enumerate(slab_bytes) if size <= left]:
        limiting = min(fitting, key=lambda g: counts[g] * per_slab[g] / needs[g].demand_blocks)
        counts[limiting] += 1
        left -= slab_bytes[limiting]
    return counts


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
