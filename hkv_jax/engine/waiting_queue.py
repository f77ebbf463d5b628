"""The queue of sequences that wait for a lane, oldest first."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from hkv_jax.engine.request import Sequence


class WaitingQueue:
    """Sequences in order of age.

    New ones are younger than all others and go to the end; those that come back (preempted, or samples that could not
    share their leader's prompt) are older than all new ones and find their place near the front, so both cost next to
    nothing however long the queue is.
    """

    def __init__(self) -> None:
        self._queue: collections.deque[Sequence] = collections.deque()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    @property
    def head(self) -> Sequence:
        """The oldest; the queue must not be empty."""
        return self._queue[0]

    def append(self, sequence: Sequence) -> None:
        """Adds one that is younger than all others."""
        assert not self._queue or self._queue[-1].age < sequence.age, "a new sequence is older than a waiting one"
        self._queue.append(sequence)

    def insert(self, sequence: Sequence) -> None:
        """Adds one where its age belongs."""
        place = next((i for i, other in enumerate(self._queue) if sequence.age < other.age), len(self._queue))
        self._queue.insert(place, sequence)

    def pop(self) -> Sequence:
        """Takes the oldest."""
        return self._queue.popleft()

    def remove(self, sequence: Sequence) -> None:
        """Takes one out of the middle.

        Raises:
            ValueError: it is not there.
        """
        self._queue.remove(sequence)
