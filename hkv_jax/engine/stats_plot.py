"""A picture of what the engine did: who held the KV memory, and how prompts were served.

Owns: that picture. Must never: import matplotlib before one is asked for, or read a living engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hkv_jax.engine.stats_history import Moment
from hkv_jax.errors import ConfigError
from hkv_jax.kvcache.manager import PoolStats
from hkv_jax.outputs import PrefixHit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POOL_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_HIT_COLOURS = {
    PrefixHit.RESIDENT: "tab:green",
    PrefixHit.REBUILD: "tab:blue",
    PrefixHit.TRUNCATE: "tab:orange",
    PrefixHit.MISS: "tab:gray",
}
_MIB = 2**20

Layer = tuple[str, str, float, NDArray[np.float64]]
"""Label, colour, opacity, and a height for each moment."""


def load_pyplot() -> ModuleType:
    """matplotlib's ``pyplot``.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("a plot needs matplotlib, which is not installed: pip install 'hkv-jax[notebook]'") from error
    return pyplot


def plot_history(moments: Sequence[Moment]) -> Figure:
    """Draws the memory of one device by owner and use, the sequences, and requests by kind of hit, over time.

    In the first panel each pool has a colour, in three strengths: blocks that requests hold, blocks kept for reuse, and
    free ones. Where a colour ends the next pool begins, so a boundary that moves is seen to move.

    Args:
        moments: at least one, oldest first.

    Returns:
        A figure that a notebook shows where it is a cell's result; ``savefig`` writes it to a file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    seconds = np.array([moment.seconds for moment in moments])
    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(10, 8), height_ratios=(3, 1, 1.5), layout="constrained")
    _stack(axes[0], seconds, _memory(moments))
    axes[0].set(title="KV cache of one device", ylabel="MiB")
    _stack(axes[1], seconds, _sequences(moments))
    axes[1].set(ylabel="sequences")
    for counts in axes[1:]:
        counts.yaxis.get_major_locator().set_params(integer=True)
    _stack(axes[2], seconds, _hits(moments))
    axes[2].set(title=_prompt_summary(moments[-1]), ylabel="requests", xlabel="seconds since start")
    # A figure that pyplot still knew would be shown twice in a notebook, and never be freed.
    pyplot.close(figure)
    return figure


def _memory(moments: Sequence[Moment]) -> list[Layer]:
    layers = []
    for index, pool in enumerate(moments[-1].stats.pools):
        colour = _POOL_COLOURS[index % len(_POOL_COLOURS)]
        parts: tuple[tuple[str, float, Callable[[PoolStats], int]], ...] = (
            ("in use", 1.0, lambda pool: pool.used_blocks),
            ("kept for reuse", 0.55, lambda pool: pool.cached_blocks),
            ("free", 0.2, lambda pool: pool.num_blocks - pool.used_blocks - pool.cached_blocks),
        )
        for what, opacity, count in parts:
            blocks = np.array([count(moment.stats.pools[index]) for moment in moments])
            layers.append((f"{pool.name}: {what}", colour, opacity, blocks * pool.block_bytes / _MIB))
    return layers


def _sequences(moments: Sequence[Moment]) -> list[Layer]:
    running = np.array([moment.stats.num_running for moment in moments], float)
    waiting = np.array([moment.stats.num_waiting for moment in moments], float)
    return [("running", "tab:purple", 1.0, running), ("waiting", "tab:purple", 0.3, waiting)]


def _hits(moments: Sequence[Moment]) -> list[Layer]:
    return [
        (str(hit), colour, 1.0, np.array([moment.stats.prefix.hits.get(hit, 0) for moment in moments], float))
        for hit, colour in _HIT_COLOURS.items()
    ]


def _prompt_summary(latest: Moment) -> str:
    prefix = latest.stats.prefix
    share = prefix.prefix_hit_tokens / max(1, prefix.prompt_tokens)
    return f"requests by kind of prefix hit; {share:.0%} of {prefix.prompt_tokens:,} prompt tokens not computed"


def _stack(axes: Axes, seconds: NDArray[np.float64], layers: Sequence[Layer]) -> None:
    """Layers on top of each other, each a step a moment."""
    bottom = np.zeros(len(seconds))
    for label, colour, opacity, height in layers:
        top = bottom + height
        axes.fill_between(seconds, bottom, top, step="post", color=colour, alpha=opacity, linewidth=0, label=label)
        bottom = top
    axes.set_ylim(0, float(bottom.max()) * 1.05 or 1.0)
    axes.set_xlim(0, max(float(seconds[-1]), 1e-3))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, reverse=True)
