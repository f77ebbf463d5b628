"""Runs are made once, in processes, and can be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.cache_bench.cases import Case, Result, Run
from tools.cache_bench.results import Results, RunFailedError

FIRST, SECOND = Run(Case("chat", "a", 1)), Run(Case("docqa", "b", 2.5, seed=3), "hybrid", "static", 8, 0.25)


def measured(run: Run) -> Result:
    """Stands in for a simulation; in a process of its own."""
    if run.case.model == "bad":
        raise ValueError("it broke")
    return {"of": str(run)}


def test_a_run_is_made_once_and_told() -> None:
    told: list[str] = []
    results = Results(1, told.append, measured)
    results.make([FIRST, SECOND, FIRST])
    results.make([SECOND])
    assert results[FIRST] == {"of": str(FIRST)}
    assert results[SECOND] == {"of": str(SECOND)}
    assert [line.split(" ")[0] for line in told] == ["1", "2"]
    assert told[0].endswith(str(FIRST))


def test_results_are_kept(tmp_path: Path) -> None:
    results = Results(1, lambda line: None, measured)
    results.make([FIRST, SECOND])
    results.save(tmp_path / "results.jsonl")
    told: list[str] = []
    again = Results(1, told.append, measured)
    again.load(tmp_path / "results.jsonl")
    again.make([FIRST, SECOND])
    assert again[SECOND] == results[SECOND]
    assert told == []


def test_a_run_that_fails_is_named() -> None:
    results = Results(1, lambda line: None, measured)
    with pytest.raises(RunFailedError, match="chat, bad, 1 GiB, hybrid, moving: ValueError: it broke"):
        results.make([FIRST, Run(Case("chat", "bad", 1))])
    assert results[FIRST] == {"of": str(FIRST)}
