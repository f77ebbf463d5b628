"""Sequences in order of age."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from hkv_jax.engine.request import Sequence


class WaitingQueue:
    """Sequences that wait, oldest first; each may be taken out of the middle."""

    def __init__(self) -> None:
        self._queue: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def __contains__(self, sequence: Sequence) -> bool:
        place = self._place(sequence)
        return place < len(self._queue) and self._queue[place] is sequence

    @property
    def head(self) -> Sequence | None:
        """The oldest."""
        return self._queue[0] if self._queue else None

    def insert(self, sequence: Sequence) -> None:
        """Adds one where its age belongs."""
        self._queue.insert(self._place(sequence), sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes one out.

        Raises:
            ValueError: it is not there.
        """
        if sequence not in self:
            raise ValueError("the sequence does not wait here")
        del self._queue[self._place(sequence)]

    def _place(self, sequence: Sequence) -> int:
        return bisect.bisect_left(self._queue, sequence.age, key=lambda other: other.age)
