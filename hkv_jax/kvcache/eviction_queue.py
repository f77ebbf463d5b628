"""The order in which join points are evicted.

Owns: the queue, and the protocol of those who value join points. Must never: know blocks, or evict.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Protocol

from hkv_jax.kvcache.join_point import JoinKind, JoinPoint, Stake


class EvictionOrder(Protocol):
    """What join points are worth. The one with the smallest key goes first."""

    def key(self, join: JoinPoint, stake: Stake) -> float:
        """Its place in the order, which changes only when something happens to it, not as time passes."""
        ...

    def chance(self, kind: JoinKind, num_uses: int) -> float:
        """That a join point of this kind, used so often, is used again."""
        ...

    def note_made(self, kind: JoinKind, num_uses: int) -> None:
        """A join point came to have been used so often."""
        ...

    def note_used(self, kind: JoinKind, num_uses: int) -> None:
        """One that had been used so often was used, or would have been, had it not been evicted."""
        ...


class EvictionQueue:
    """Join points by key; what has happened since a join point was pushed makes its place void."""

    def __init__(self, order: EvictionOrder) -> None:
        self._order = order
        self._heap: list[tuple[float, int, int, JoinPoint]] = []
        self._ticket = itertools.count()
        self._num_valid = 0  # after the last clearing

    def push(self, join: JoinPoint, stake: Stake) -> None:
        """Gives ``join`` its place; an earlier one is void."""
        join.version += 1
        heapq.heappush(self._heap, (self._order.key(join, stake), next(self._ticket), join.version, join))
        if len(self._heap) > 2 * self._num_valid + 64:
            self._heap = [entry for entry in self._heap if _is_valid(entry)]
            heapq.heapify(self._heap)
            self._num_valid = len(self._heap)

    def pop(self) -> tuple[JoinPoint, float] | None:
        """Takes the join point with the smallest key, and that key; ``None`` from an empty queue."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            if _is_valid(entry):
                entry[3].version += 1
                return entry[3], entry[0]
        return None


def _is_valid(entry: tuple[float, int, int, JoinPoint]) -> bool:
    return entry[3].alive and entry[2] == entry[3].version
