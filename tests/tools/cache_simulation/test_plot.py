"""The samples of a picture: what they say, and that a long replay costs no memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hkv_jax.errors import ConfigError
from tests.tools.cache_simulation.tiny_simulation import request, tiny_simulation
from tools.cache_simulation import plot
from tools.cache_simulation.plot import Recorder


def recorded(max_samples: int, monkeypatch: pytest.MonkeyPatch, steps: int = 100) -> Recorder:
    monkeypatch.setattr(plot, "MAX_SAMPLES", max_samples)
    recorder = Recorder()
    tiny_simulation([request("a", [("prompt", 100)], steps)]).run(recorder)
    return recorder


def test_a_sample_tells_who_has_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded(1000, monkeypatch)
    first, last = recorder.samples[0], recorder.samples[-1]
    block = 32 * 128 * 2
    # 100 tokens in blocks of 32, all of them held; 199 of them in the end, of which 6 full blocks stay.
    assert (first.pools["global"].held, first.running) == (4 * block, 1)
    assert (last.pools["global"].held, last.pools["global"].cached, last.running) == (0, 6 * block, 0)
    assert sum(pool.owned for pool in first.pools.values()) <= 2**22
    assert last.hits == {"resident": 0, "rebuild": 0, "truncate": 0, "miss": 1}
    assert [sample.moment for sample in recorder.samples] == sorted(sample.moment for sample in recorder.samples)


def test_samples_thin_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(recorded(1000, monkeypatch).samples) == 100
    thin = recorded(8, monkeypatch).samples
    assert 8 <= len(thin) < 16
    gaps = {round(later.moment - earlier.moment, 6) for earlier, later in itertools.pairwise(thin)}
    assert gaps == {0.2}


def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    recorder = recorded(1000, monkeypatch)
    for path in (tmp_path / "missing" / "run.png", tmp_path / "run.nothing"):
        with pytest.raises(ConfigError, match="cannot be written"):
            recorder.draw(path, "run")
