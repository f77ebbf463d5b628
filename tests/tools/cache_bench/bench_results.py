"""Results that no simulation made, for tests of the tables and of the search."""

from __future__ import annotations

from collections.abc import Callable

from tools.cache_bench.cases import Result, Run
from tools.cache_bench.results import Results


def result(hit: float = 0.5, p50: float = 1.0, p99: float = 2.0, mean: float = 1.2, seconds: float = 100.0) -> Result:
    """A result with these figures, of 1,000 prompt tokens."""
    return {
        "prompt_tokens": 1000,
        "prefix_hit_tokens": round(1000 * hit),
        "ttft_p50_s": p50,
        "ttft_p99_s": p99,
        "ttft_mean_s": mean,
        "virtual_s": seconds,
        "preemptions": 3,
        "slabs_moved": 7,
        "copied_bytes": 2 * 10**11,
        "hits": {"resident": 1, "rebuild": 2, "truncate": 3, "miss": 4},
    }


class GivenResults(Results):
    """Results of a function of the run; ``made`` are the runs it was asked for, in order."""

    def __init__(self, of: Callable[[Run], Result | None]) -> None:
        super().__init__(jobs=1, tell=lambda line: None)
        self._of = of
        self.made: list[Run] = []

    def make(self, runs: object) -> None:
        for run in runs:  # type: ignore[attr-defined]
            if run not in self._known:
                self.made.append(run)
                self._known[run] = self._of(run)
