"""Virtual time: what a step costs."""

from __future__ import annotations

import pytest

from hkv_jax.errors import ConfigError
from tools.cache_simulation.virtual_clock import StepCost, VirtualClock


def test_a_step_costs_its_time_its_prefill_and_its_copies() -> None:
    assert StepCost().seconds(0, 0) == pytest.approx(0.025)
    assert StepCost().seconds(8192, 0) == pytest.approx(0.025 + 8192 * 20e-6)
    assert StepCost().seconds(0, 10**9) == pytest.approx(0.025 + 0.002)
    assert StepCost(step_ms=10, prefill_us=5, copy_gbps=1).seconds(100, 10**9) == pytest.approx(0.010 + 0.0005 + 1)


@pytest.mark.parametrize("rates", [{"step_ms": 0}, {"prefill_us": -1}, {"copy_gbps": 0}])
def test_time_does_not_stand_still(rates: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"accepted: a number (above|at least) 0"):
        StepCost(**rates)


def test_the_clock_goes_forward_only() -> None:
    clock = VirtualClock()
    clock.advance(1.5)
    clock.wait_until(1.0)
    assert clock() == 1.5
    clock.wait_until(4.0)
    assert clock() == 4.0
