"""The static split that serves a case best, found by trying.

Owns: which shares are tried. Must never: know how the engine splits.
"""

from __future__ import annotations

import itertools

from tools.cache_bench.cases import Case, Result, Run
from tools.cache_bench.results import Results

FIRST_SHARES = 7
REFINEMENTS = 2


def best_static(case: Case, results: Results, policy: str = "hybrid") -> Run:
    """The static run of ``case`` with the least mean TTFT.

    Evenly spread shares are tried first, then those halfway from the best to its neighbours.
    """
    low, high = possible_shares(case)
    tried = [low + (high - low) * number / (FIRST_SHARES - 1) for number in range(FIRST_SHARES)]
    runs = {share: Run(case, policy, "static", share=round(share, 6)) for share in tried}
    results.make(runs.values())
    for _ in range(REFINEMENTS):
        shares = sorted(runs)
        place = shares.index(min(shares, key=lambda share: _mean_ttft(results[runs[share]])))
        neighbours = shares[max(0, place - 1) : place + 2]
        for left, right in itertools.pairwise(neighbours):
            share = (left + right) / 2
            runs[share] = Run(case, policy, "static", share=round(share, 6))
        results.make(runs.values())
    return min(runs.values(), key=lambda run: _mean_ttft(results[run]))


def possible_shares(case: Case) -> tuple[float, float]:
    """The least and the largest share of the memory that the global layers can have."""
    layout = Run(case, partition="static").simulation().replay().cache.layout
    needs = [group.reserve_slabs * layout.arenas[group.arena].slab_bytes for group in layout.groups]
    slack = 1e-5  # shares are rounded
    return needs[0] / case.kv_cache_memory + slack, 1 - needs[1] / case.kv_cache_memory - slack


def _mean_ttft(result: Result) -> float:
    seconds = result["ttft_mean_s"]
    assert isinstance(seconds, float)
    return seconds
