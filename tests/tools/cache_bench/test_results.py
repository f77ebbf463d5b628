"""Runs are made once, in processes, and can be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.cache_bench.cases import Case, Result, Run
from tools.cache_bench.results import Results, RunFailedError

FIRST, SECOND = Run(Case("chat", "a", 1)), Run(Case("docqa", "b", 2.5, seed=3), "hybrid", "static", 8, 0.25)


def measured(run: Run) -> Result | None:
    """Stands in for a simulation; in a process of its own."""
    if run.case.model == "small":
        return None
    if run.case.model == "bad":
        raise ValueError("it broke")
    return {"of": str(run)}


def test_a_run_is_made_once_and_told() -> None:
    told: list[str] = []
    results = Results(1, told.append, measure_one=measured)
    results.make([FIRST, SECOND, FIRST])
    results.make([SECOND])
    assert results[FIRST] == {"of": str(FIRST)}
    assert results[SECOND] == {"of": str(SECOND)}
    assert [line.split(" ")[0] for line in told] == ["1", "2"]
    assert told[0].endswith(str(FIRST))


def test_results_are_kept(tmp_path: Path) -> None:
    file, told = tmp_path / "results.jsonl", list[str]()
    first = Results(1, told.append, file, measured)
    first.make([FIRST])
    again = Results(1, told.append, file, measured)
    again.make([FIRST, SECOND])
    assert again[FIRST] == first[FIRST]
    assert len(told) == 2
    assert len(file.read_text(encoding="utf-8").splitlines()) == 2


def test_memory_that_does_not_suffice_is_a_result() -> None:
    results = Results(1, lambda line: None, measure_one=measured)
    run = Run(Case("chat", "small", 1))
    results.make([run])
    assert results.get(run) is None
    with pytest.raises(AssertionError, match="chat, small, 1 GiB, hybrid, moving: too little memory"):
        results[run]


def test_a_run_that_fails_is_named() -> None:
    results = Results(1, lambda line: None, measure_one=measured)
    with pytest.raises(RunFailedError, match="chat, bad, 1 GiB, hybrid, moving: ValueError: it broke"):
        results.make([FIRST, Run(Case("chat", "bad", 1))])
    assert results[FIRST] == {"of": str(FIRST)}
