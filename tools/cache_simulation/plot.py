"""A picture of a replay: who owns and fills the memory over time, and how prefixes were found.

Owns: the samples and the figure. Must never: import matplotlib unless a picture is drawn.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from hkv_jax.errors import ConfigError
from hkv_jax.outputs import PrefixHit
from tools.cache_simulation.measurements import HIT_KINDS
from tools.cache_simulation.replay import Replay

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_SAMPLES = 4000
"""More than a picture has columns; every other sample is dropped when there are twice as many."""

COLORS = {"resident": "#2a7f62", "rebuild": "#3b6fb6", "truncate": "#d99a2b", "miss": "#b5483a"}


@dataclasses.dataclass(frozen=True, slots=True)
class PoolSample:
    """Bytes of a pool: those it owns, those held by running sequences, those kept for later ones."""

    owned: int
    held: int
    cached: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A moment in virtual seconds: the pools by name, running and waiting requests, hits so far by kind."""

    moment: float
    pools: dict[str, PoolSample]
    running: int
    waiting: int
    hits: dict[str, int]


class Recorder:
    """Takes samples of a replay after its steps; ever fewer of them, so that a long replay costs no memory."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._every = 1
        self._steps = 0

    def __call__(self, replay: Replay) -> None:
        """Takes one if it is time."""
        self._steps += 1
        if self._steps % self._every:
            return
        self.samples.append(_sample(replay))
        if len(self.samples) >= 2 * MAX_SAMPLES:
            self.samples = self.samples[1::2]
            self._every *= 2

    def draw(self, path: Path, title: str) -> None:
        """Writes the picture; the ending of ``path`` says which kind.

        Raises:
            ConfigError: matplotlib is not installed, or the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError("plot: matplotlib is not installed; pip install 'hkv-jax[notebook]' brings it") from error
        names = list(self.samples[0].pools)
        figure = Figure(figsize=(11, 3 * (len(names) + 2)), layout="constrained")
        axes = figure.subplots(len(names) + 2, 1, sharex=True)
        figure.suptitle(title)
        for axis, name in zip(axes, names, strict=False):
            self._draw_pool(axis, name)
        self._draw_requests(axes[-2])
        self._draw_hits(axes[-1])
        axes[-1].set_xlabel("virtual seconds")
        try:
            figure.savefig(path, dpi=110)
        except (OSError, ValueError) as error:
            raise ConfigError(f"plot: {path} cannot be written ({error})") from error

    def _draw_pool(self, axis: Axes, name: str) -> None:
        moments = [sample.moment for sample in self.samples]
        pools = [sample.pools[name] for sample in self.samples]
        held = [pool.held / 2**30 for pool in pools]
        cached = [pool.cached / 2**30 for pool in pools]
        axis.stackplot(
            moments,
            held,
            cached,
            labels=("held by running requests", "kept for later ones"),
            colors=("#3b6fb6", "#a9c4e6"),
        )
        axis.plot(moments, [pool.owned / 2**30 for pool in pools], color="black", linewidth=1, label="owned")
        axis.set_ylabel(f"{name} pool, GiB")
        axis.legend(loc="upper right", fontsize="small")

    def _draw_requests(self, axis: Axes) -> None:
        moments = [sample.moment for sample in self.samples]
        axis.plot(moments, [sample.running for sample in self.samples], linewidth=1, label="running")
        axis.plot(moments, [sample.waiting for sample in self.samples], linewidth=1, label="waiting")
        axis.set_ylabel("requests")
        axis.legend(loc="upper right", fontsize="small")

    def _draw_hits(self, axis: Axes) -> None:
        moments = [sample.moment for sample in self.samples]
        counts = [[sample.hits[kind] for sample in self.samples] for kind in HIT_KINDS]
        axis.stackplot(moments, *counts, labels=HIT_KINDS, colors=[COLORS[kind] for kind in HIT_KINDS])
        axis.set_ylabel("requests admitted, by hit")
        axis.legend(loc="upper left", fontsize="small")


def _sample(replay: Replay) -> Sample:
    pools = {
        pool.name: PoolSample(
            pool.num_blocks * pool.block_bytes,
            pool.used_blocks * pool.block_bytes,
            pool.cached_blocks * pool.block_bytes,
        )
        for pool in replay.cache.stats()
    }
    hits = replay.scheduler.prefix_stats.hits
    return Sample(
        moment=replay.clock.now,
        pools=pools,
        running=replay.scheduler.num_running,
        waiting=replay.scheduler.num_waiting,
        hits={kind: hits[PrefixHit(kind)] for kind in HIT_KINDS},
    )
