"""The picture of an engine's life: areas that add up to the memory, and to the requests."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hkv_jax.engine.prefix_stats import PrefixStats
from hkv_jax.engine.stats import EngineStats
from hkv_jax.engine.stats_history import Moment
from hkv_jax.engine.stats_plot import plot_history
from hkv_jax.errors import ConfigError
from hkv_jax.kvcache.manager import PoolStats
from hkv_jax.outputs import PrefixHit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20


def moment(seconds: float, owned: tuple[int, int], hits: int) -> Moment:
    """Two pools whose blocks are 1 and 2 MiB; in each 3 blocks are held and 2 kept."""
    pools = tuple(
        PoolStats(
            name=name,
            num_blocks=num_blocks,
            used_blocks=3,
            peak_used_blocks=3,
            released_early_blocks=0,
            block_bytes=size * MIB,
            block_size=16,
            cached_blocks=2,
        )
        for name, num_blocks, size in zip(("global", "sliding"), owned, (1, 2), strict=True)
    )
    counts = dict.fromkeys(PrefixHit, 0) | {PrefixHit.REBUILD: hits}
    prefix = PrefixStats(hits=counts, prompt_tokens=1000 * hits, prefix_hit_tokens=250 * hits)
    return Moment(seconds, EngineStats(num_running=2, num_waiting=hits, pools=pools, prefix=prefix))


def edges(axes: Axes) -> dict[str, set[float]]:
    """The heights at which each area begins and ends."""
    return {
        str(area.get_label()): set(np.round(np.asarray(area.get_paths()[0].vertices)[:, 1], 6).tolist())
        for area in axes.collections
    }


def test_the_areas_are_the_pools_and_the_boundary_moves() -> None:
    pytest.importorskip("matplotlib")
    figure = plot_history([moment(0, (10, 20), 0), moment(1.5, (16, 17), 4), moment(3, (16, 17), 6)])
    memory, sequences, hits = figure.axes
    legend = memory.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == set(edges(memory))
    assert edges(memory) == {
        "global: in use": {0, 3},
        "global: kept for reuse": {3, 5},
        "global: free": {5, 10, 16},  # in MiB; the boundary went from 10 to 16
        "sliding: in use": {10, 16, 22},
        "sliding: kept for reuse": {16, 20, 22, 26},
        "sliding: free": {20, 26, 50},
    }
    assert edges(sequences) == {"running": {0, 2}, "waiting": {2, 6, 8}}
    assert edges(hits)["rebuild"] == {0, 4, 6}
    assert "25%" in hits.get_title()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


def test_an_engine_that_has_done_nothing_can_be_drawn() -> None:
    pytest.importorskip("matplotlib")
    figure = plot_history([moment(0, (10, 20), 0)])
    assert "0% of 0 prompt tokens" in figure.axes[2].get_title()


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'hkv-jax\[notebook\]'"):
        plot_history([moment(0, (10, 20), 0)])
