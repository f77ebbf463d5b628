"""The best static split is found, and every share that is tried can be had."""

from __future__ import annotations

import pytest

from tests.tools.cache_bench.bench_results import GivenResults, result
from tools.cache_bench.cases import Case, Run
from tools.cache_bench.static_search import best_static, possible_shares

CASE = Case("docqa", "gemma3-27b", 12)


def test_the_ends_of_the_range_hold_one_sequence_and_no_more() -> None:
    low, high = possible_shares(CASE)
    assert 0 < low < 0.5 < high < 1
    for share in (low, high):
        layout = Run(CASE, partition="static", share=share).simulation().replay().cache.layout
        spare = [group.num_blocks - group.floor_blocks for group in layout.groups]
        assert 0 <= min(spare) <= 1


@pytest.mark.parametrize("wanted", [0.45, 0.6, 0.93])
def test_the_least_mean_is_found(wanted: float) -> None:
    results = GivenResults(lambda run: result(mean=abs((run.share or 0.0) - wanted)))
    best = best_static(CASE, results)
    assert best.share == pytest.approx(wanted, abs=0.02)
    assert all(run.partition == "static" and run.share is not None for run in results.made)
    assert len(results.made) <= 15
