"""The history of a replay that is drawn, and the file it is drawn to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hkv_jax.engine.stats_history import Moment
from hkv_jax.engine.stats_plot import plot_history
from hkv_jax.errors import ConfigError
from hkv_jax.outputs import PrefixHit
from tests.tools.cache_simulation.tiny_simulation import request, tiny_simulation
from tools.cache_simulation import plot
from tools.cache_simulation.plot import Recorder


def recorded() -> Recorder:
    replay = tiny_simulation([request("a", [("prompt", 100)], 100), request("b", [("prompt", 100)], 9, 5.0)]).replay()
    recorder = Recorder(replay)
    replay.run(recorder)
    return recorder


def test_what_is_drawn_is_the_replay_in_virtual_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    seen: list[Moment] = []

    def look(moments: Sequence[Moment]) -> object:
        seen.extend(moments)
        return plot_history(moments)

    monkeypatch.setattr(plot, "plot_history", look)
    recorded().draw(tmp_path / "run.png", "tiny")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    start, first, last = seen[0], seen[1], seen[-1]
    assert start.stats.num_running == 0
    # 100 tokens in blocks of 32, all of them held.
    assert first.seconds == pytest.approx(0.027)
    assert first.stats.num_running == 1
    assert first.stats.pools[0].used_blocks == 4
    assert last.seconds == pytest.approx(5.0 + 9 * 0.025 + 4 * 20e-6)
    assert last.stats.prefix.hits[PrefixHit.RESIDENT] == last.stats.prefix.hits[PrefixHit.MISS] == 1
    assert last.stats.pools[0].used_blocks == 0 < last.stats.pools[0].cached_blocks


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recorder = recorded()
    for path in (tmp_path / "missing" / "run.png", tmp_path / "run.nothing"):
        with pytest.raises(ConfigError, match="cannot be written"):
            recorder.draw(path, "run")
