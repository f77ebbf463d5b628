"""How often each bundle runs: a model, laid over a schedule that was read.

Trip counts come from the kernels' sources. Conditional code counts as run, unless a kernel's model says how often it is
not. Owns: the arithmetic. Must never: parse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tools.tpu_costs.schedule import Loop, Schedule


@dataclasses.dataclass
class Counts:
    """Executions of each bundle, f64[bundles], all 1 at first: as if no loop turned."""

    schedule: Schedule
    of_bundle: NDArray[np.float64]

    @classmethod
    def of(cls, schedule: Schedule) -> Counts:
        """Every bundle once."""
        return cls(schedule, np.ones(schedule.num_bundles))

    def repeat(self, loop: Loop, trips: float) -> None:
        """The loop turns ``trips`` times each time it is entered."""
        self.of_bundle[loop.start : loop.end] *= trips

    def rarely(self, stretch: tuple[int, int], share: float) -> None:
        """A conditional stretch runs in this share of the times that code around it does."""
        self.of_bundle[stretch[0] : stretch[1]] *= share

    @property
    def bundles(self) -> float:
        """Bundles issued in all."""
        return float(self.of_bundle.sum())

    def utilisation(self) -> NDArray[np.float64]:
        """Share of the slots of each unit that are taken, over all that is issued."""
        taken = (self.of_bundle[:, None] * self.schedule.slots).sum(axis=0)
        return np.asarray(taken / (self.schedule.capacity * max(1.0, self.bundles)))


def first_fetch(schedule: Schedule, loop: Loop, least_bundles: int = 16) -> tuple[int, int] | None:
    """The first conditional stretch of a loop's own that does little but issue copies: a pipeline's prologue."""
    inner = [(other.start, other.end) for other in loop.loops]
    for start, end in sorted(loop.skips):
        holds_loop = any(start <= other < end for other, _ in inner)
        if end - start >= least_bundles and schedule.copies_in(start, end) and not holds_loop:
            return start, end
    return None


def walk(loop: Loop, visit: Callable[[Loop], None]) -> None:
    """Calls ``visit`` for each loop below, outer ones first."""
    for inner in loop.loops:
        visit(inner)
        walk(inner, visit)


def largest(loops: list[Loop]) -> Loop:
    """The loop with most bundles.

    Raises:
        LookupError: there is no loop: the kernel is not of the structure that its model describes.
    """
    if not loops:
        raise LookupError("the schedule has no loop where the kernel's model expects one")
    return max(loops, key=lambda loop: loop.bundles)
