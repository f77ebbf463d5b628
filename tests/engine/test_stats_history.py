"""Moments of an engine's life: the first, the latest, and evenly spaced ones between."""

from __future__ import annotations

import itertools

import pytest

from hkv_jax.engine.stats import EngineStats
from hkv_jax.engine.stats_history import StatsHistory


def seconds_after(num_steps: int, capacity: int) -> list[float]:
    history = StatsHistory(EngineStats(), capacity)
    for step in range(1, num_steps + 1):
        history.add(float(step), EngineStats(num_output_tokens=step))
    moments = history.moments()
    assert [moment.stats.num_output_tokens for moment in moments] == [int(moment.seconds) for moment in moments]
    return [moment.seconds for moment in moments]


def test_a_short_life_is_remembered_whole() -> None:
    assert seconds_after(0, 4) == [0]
    assert seconds_after(3, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("capacity", [2, 3, 4, 7])
def test_a_long_life_is_remembered_evenly_and_up_to_now(capacity: int) -> None:
    for num_steps in range(100):
        kept = seconds_after(num_steps, capacity)
        assert kept[0] == 0
        assert kept[-1] == num_steps
        assert len(kept) <= capacity + 1
        assert len(kept) >= min(num_steps + 1, capacity // 2)
        *even, last = [after - before for before, after in itertools.pairwise(kept)] or [0.0]
        assert len(set(even)) <= 1
        assert last <= max(even, default=last)
