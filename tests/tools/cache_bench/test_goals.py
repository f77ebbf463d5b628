"""What is asked of the cache, and when it is missed."""

from __future__ import annotations

import pytest

from tests.tools.cache_bench.bench_results import result
from tools.cache_bench.cases import Case
from tools.cache_bench.goals import GOALS, Figures, Goal, vllm_figures


def test_every_goal_has_figures_of_vllm_and_asks_for_more() -> None:
    for goal in GOALS:
        theirs = vllm_figures()[goal.case]
        if goal.hit is not None and goal.p50 is not None:
            assert goal.hit > theirs.hit
            assert goal.p50 <= theirs.p50
    assert len(vllm_figures()) == 18


def test_figures_of_a_result() -> None:
    assert Figures.of(result(0.25, 1.0, 2.0, 1.5, 80.0)) == Figures(0.25, 1.0, 2.0, 80.0, 1.5)


@pytest.mark.parametrize(
    ("ours", "missed"),
    [
        (Figures(0.60, 9.0, 275.0, 452.0), []),
        # 9.004 prints as 9.00; the figures compared with were rounded alike.
        (Figures(0.58, 9.004, 289.5, 475.0), []),
        (Figures(0.57, 9.0, 275.0, 452.0), ["hit 0.570 < 0.58"]),
        (Figures(0.60, 9.1, 275.0, 452.0), ["p50 9.10 > 9 s"]),
        (Figures(0.60, 9.0, 290.0, 452.0), ["p99 290.00 > 1.05 x 275.7 s"]),
        (Figures(0.60, 9.0, 275.0, 476.0), ["476.0 virtual s > 1.05 x 452"]),
    ],
)
def test_a_goal_is_missed_by_each_of_its_parts(ours: Figures, missed: list[str]) -> None:
    goal = next(goal for goal in GOALS if goal.case == Case("docqa", "gemma3-27b", 12))
    assert goal.missed(ours) == missed


def test_where_nothing_is_shared_time_is_what_counts() -> None:
    goal = Goal(Case("mixed", "gemma3-27b", 12), of_vllm_time=0.85)
    assert goal.missed(Figures(0.0, 90.0, 180.0, 260.0)) == []
    assert goal.missed(Figures(0.0, 90.0, 180.0, 261.0)) == ["261.0 virtual s > 0.85 x 306"]
