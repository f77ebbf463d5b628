"""The cache benchmark as a command."""

from __future__ import annotations

import sys

import pytest

from tests.tools.cache_bench.bench_results import GivenResults, result
from tools import bench_cache
from tools.cache_bench.cases import Case, Result, Run
from tools.cache_bench.results import Results, RunFailedError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_cache.py", *arguments])
    bench_cache.main()


def test_sections_are_printed_as_markdown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_cache, "Results", lambda jobs, tell, file: GivenResults(lambda one: result()))
    run(monkeypatch, "goals", "--ours-only")
    out = capsys.readouterr().out
    assert out.startswith("Against vLLM, and against simpler caches.")
    assert "| docqa gemma3-27b 12 |" in out
    assert "Other seeds" not in out


def test_a_run_that_fails_ends_the_command_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(Results):
        def make(self, runs: object) -> None:
            raise RunFailedError("chat, gpt-oss-20b: AssertionError: M1")

    monkeypatch.setattr(bench_cache, "Results", Failing)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "goals")
    assert caught.value.code == 1
    assert "chat, gpt-oss-20b: AssertionError: M1" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["poetry"], ["goals", "--jobs", "0"]])
def test_bad_arguments_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code == 2


def test_one_run_for_real() -> None:
    results = Results(1, lambda line: None, measure_one=small)
    results.make([Run(Case("docqa", "gpt-oss-20b", 4))])
    assert results[Run(Case("docqa", "gpt-oss-20b", 4))]["finished"] == 5


def small(one: Run) -> Result:
    """The first requests of a run's trace, in a process of its own."""
    simulation = one.simulation()
    return type(simulation)(simulation.requests[:5], simulation.geometry, simulation.config).run().to_json()
