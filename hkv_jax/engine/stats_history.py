"""What the engine was doing at earlier moments, in bounded memory.

Owns: which moments are remembered. Must never: cost a step more than an append, or be written by two threads.
"""

from __future__ import annotations

import dataclasses

from hkv_jax.engine.stats import EngineStats


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """The engine ``seconds`` after its start; it stayed so until the next moment."""

    seconds: float
    stats: EngineStats


class StatsHistory:
    """The first moment, the latest, and evenly spaced steps between them.

    Once ``capacity`` moments are kept, every other one is dropped, and from then on half as many steps are kept: the
    whole life of an engine fits, ever coarser.
    """

    def __init__(self, first: EngineStats, capacity: int = 1024) -> None:
        """Begins with ``first`` at second 0; ``capacity`` is at least 2."""
        self._capacity = capacity
        self._stride = 1  # kept moments are the multiples of it
        self._num_added = 1
        self._latest = Moment(0.0, first)
        self._kept = [self._latest]

    def add(self, seconds: float, stats: EngineStats) -> None:
        """Takes what the engine is ``seconds`` after its start; for one thread alone."""
        self._latest = Moment(seconds, stats)
        if self._num_added % self._stride == 0:
            if len(self._kept) == self._capacity:
                self._kept = self._kept[::2]
                self._stride *= 2
            if self._num_added % self._stride == 0:
                self._kept.append(self._latest)
        self._num_added += 1

    def moments(self) -> tuple[Moment, ...]:
        """Those kept, from the first to the latest; for any thread."""
        kept, latest = tuple(self._kept), self._latest
        return kept if kept[-1] is latest else (*kept, latest)
