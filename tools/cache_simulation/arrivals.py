"""Which requests of a trace have arrived, turns of a conversation included.

Owns: when a request arrives. Must never: know the scheduler.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from tools.cache_simulation.trace import TraceRequest


class Arrivals:
    """Requests in the order they arrive; equal moments in the order of the trace."""

    def __init__(self, requests: Sequence[TraceRequest]) -> None:
        self._requests = requests
        self._coming: list[tuple[float, int]] = []
        self._followers: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            if request.after is None:
                heapq.heappush(self._coming, (request.arrival, number))
            else:
                self._followers.setdefault(request.after, []).append(number)

    @property
    def next_arrival(self) -> float | None:
        """When the next request arrives; ``None`` while no arrival is known."""
        return self._coming[0][0] if self._coming else None

    def take(self, now: float) -> list[TraceRequest]:
        """Those that arrived until ``now`` and were not taken yet."""
        taken = []
        while self._coming and self._coming[0][0] <= now:
            taken.append(self._requests[heapq.heappop(self._coming)[1]])
        return taken

    def finish(self, request_id: str, now: float) -> None:
        """A request ended; those that follow it arrive when their user has thought."""
        for number in self._followers.pop(request_id, ()):
            follower = self._requests[number]
            heapq.heappush(self._coming, (max(follower.arrival, now + follower.think), number))
