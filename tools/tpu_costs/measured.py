"""The cost of a kernel under a load: what was read from the compiler, and the modelled time.

``time = max(bytes / HBM bandwidth, bundles / clock)``; the floor is the time that the bytes take which any kernel must
move. Not in the model: latency and efficiency of copies, launch, refresh, stalls where copies are awaited. At the best
published point of a known kernel hardware took 1.16 times such a model.

Owns: the definitions. Must never: compile or parse.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tools.tpu_costs.cases import Case
from tools.tpu_costs.chips import chip_of
from tools.tpu_costs.schedule import UNITS, Loop, Schedule
from tools.tpu_costs.trips import Counts

LATENCY_BOUND = 0.5
"""A kernel that is not bound by HBM and has no unit busier than this waits for results, not for slots."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does: executions of bundles (None: the kernel's structure has no model), and bytes by purpose.

    ``step_bytes`` are all bytes moved, ``floor_bytes`` those that no kernel can spare, ``fill_bytes`` those that must
    arrive before anything can be computed. ``hot`` are the loops where the time goes. ``visited_ratio`` is keys visited
    over keys needed.
    """

    counts: Counts
    step_bytes: float
    floor_bytes: float
    fill_bytes: float
    hot: tuple[Loop, ...]
    flops: float = 0.0
    visited_ratio: float = 1.0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compilation gave besides its schedule; seconds are the processor's, dumps not counted."""

    compile_seconds: float
    alias_bytes: int
    temp_bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """A case, its schedule, its work."""

    case: Case
    schedule: Schedule
    compiled: Compiled
    work: Work

    @property
    def hbm_seconds(self) -> float:
        """Model: the time of the bytes."""
        return self.work.step_bytes / chip_of(self.case.topology).hbm_bytes_per_second

    @property
    def compute_seconds(self) -> float:
        """Model: the time of the bundles."""
        return self.work.counts.bundles / chip_of(self.case.topology).hertz

    @property
    def seconds(self) -> float:
        """Model: steady state."""
        return max(self.hbm_seconds, self.compute_seconds)

    @property
    def fill_seconds(self) -> float:
        """Model: what the first copies take, with nothing to hide behind."""
        return self.work.fill_bytes / chip_of(self.case.topology).hbm_bytes_per_second

    @property
    def floor_seconds(self) -> float:
        """Model: the time of the bytes that no kernel can spare."""
        return self.work.floor_bytes / chip_of(self.case.topology).hbm_bytes_per_second

    @property
    def floor_ratio(self) -> float:
        """Modelled time over the floor."""
        return self.seconds / self.floor_seconds

    @property
    def floor_ratio_with_fill(self) -> float:
        """The same with the fill of the pipeline."""
        return (self.seconds + self.fill_seconds) / self.floor_seconds

    @property
    def bundles_per_sequence(self) -> float:
        """Bundles of the step a sequence."""
        return self.work.counts.bundles / self.case.batch

    @property
    def utilisation(self) -> dict[str, float]:
        """Percent of the slots of each unit, over the step."""
        return {unit: round(100 * share, 1) for unit, share in zip(UNITS, self.work.counts.utilisation(), strict=True)}

    @property
    def hot_bundles(self) -> int:
        """Bundles of the hot loops' code."""
        return sum(loop.bundles for loop in self.work.hot)

    @property
    def _hot_counts(self) -> Counts:
        """Executions in the hot loops, 0 elsewhere."""
        kept = np.zeros(self.schedule.num_bundles)
        for loop in self.work.hot:
            kept[loop.start : loop.end] = self.work.counts.of_bundle[loop.start : loop.end]
        return Counts(self.schedule, kept)

    @property
    def hot_utilisation(self) -> dict[str, float]:
        """Percent of the slots of each unit in the hot loops, with how often their parts run."""
        shares = self._hot_counts.utilisation()
        return {unit: round(100 * share, 1) for unit, share in zip(UNITS, shares, strict=True)}

    @property
    def spill_share(self) -> float:
        """Of the hot loops' stores, the share that only moves registers away."""
        stores = (self._hot_counts.of_bundle[:, None] * self.schedule.slots).sum(axis=0)
        total = float(stores[UNITS.index("VSTORE")])
        return float(stores[UNITS.index("VSTORE:SPILL")]) / total if total else 0.0

    @property
    def binds(self) -> str:
        """What the modelled time follows: HBM, the busiest unit, or latency where none is busy."""
        if self.hbm_seconds >= self.compute_seconds:
            return "HBM"
        unit, share = max(self.utilisation.items(), key=lambda item: item[1])
        return f"{unit} {share:.0f}%" if share >= 100 * LATENCY_BOUND else f"latency ({unit} {share:.0f}%)"

    def as_dict(self) -> dict[str, Any]:
        """The figures under their public names."""
        return {
            "kernel": self.case.kernel,
            "topology": self.case.topology,
            "bundles_per_sequence": round(self.bundles_per_sequence, 1),
            "bytes_per_step": round(self.work.step_bytes),
            "floor_bytes": round(self.work.floor_bytes),
            "floor_ratio": round(self.floor_ratio, 4),
            "floor_ratio_with_fill": round(self.floor_ratio_with_fill, 4),
            "binds": self.binds,
            "compile_seconds": round(self.compiled.compile_seconds, 2),
            "utilisation": self.utilisation,
            "hot_loop_utilisation": self.hot_utilisation,
            "hot_loop_bundles": self.hot_bundles,
            "spill_share_of_stores": round(self.spill_share, 3),
            "modelled_microseconds": round(self.seconds * 1e6, 2),
            "visited_ratio": round(self.work.visited_ratio, 3),
            "vmem_bytes": self.schedule.vmem_bytes,
            "smem_bytes": self.schedule.smem_bytes,
            "alias_bytes": self.compiled.alias_bytes,
            "temp_bytes": self.compiled.temp_bytes,
        }
