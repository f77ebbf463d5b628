"""A picture of a replay: who owned and filled the memory over time, and how prompts were served.

Owns: taking the replay's figures after its steps. Must never: draw by itself (``hkv_jax.engine.stats_plot`` draws what
an engine did, and this is one).
"""

from __future__ import annotations

from pathlib import Path

from hkv_jax.engine.stats import EngineStats
from hkv_jax.engine.stats_history import StatsHistory
from hkv_jax.engine.stats_plot import load_pyplot, plot_history
from hkv_jax.errors import ConfigError
from tools.cache_simulation.replay import Replay


def check_target(path: Path) -> None:
    """Raises ``ConfigError`` where ``Recorder.draw`` could not write ``path``: better before a long run than after."""
    endings = load_pyplot().FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings:
        raise ConfigError(f"plot: {path} must end in one of {', '.join(f'.{ending}' for ending in sorted(endings))}")
    if not path.parent.is_dir():
        raise ConfigError(f"plot: {path} cannot be written: {path.parent} is no folder")


class Recorder:
    """The history of one replay, in virtual seconds and bounded memory."""

    def __init__(self, replay: Replay) -> None:
        """Of a replay that has not begun."""
        self._history = StatsHistory(_stats(replay))

    def __call__(self, replay: Replay) -> None:
        """After a step."""
        self._history.add(replay.clock.now, _stats(replay))

    def draw(self, path: Path, title: str) -> None:
        """Writes the picture; the ending of ``path`` says which kind.

        Raises:
            ConfigError: matplotlib is not installed, or the file cannot be written.
        """
        figure = plot_history(self._history.moments())
        figure.suptitle(title)
        try:
            figure.savefig(path, dpi=110)
        except (OSError, ValueError) as error:
            raise ConfigError(f"plot: {path} cannot be written ({error})") from error


def _stats(replay: Replay) -> EngineStats:
    return EngineStats(
        num_running=replay.scheduler.num_running,
        num_waiting=replay.scheduler.num_waiting,
        num_preemptions=replay.scheduler.num_preemptions,
        pools=replay.cache.stats(),
        prefix=replay.scheduler.prefix_stats,
        num_slabs_moved=replay.cache.num_slabs_moved,
        copied_bytes=replay.cache.copied_bytes,
    )
