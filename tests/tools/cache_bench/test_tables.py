"""The tables of the cache benchmark: what stands in them, and what they ask to be run."""

from __future__ import annotations

from tests.tools.cache_bench.bench_results import GivenResults, result
from tools.cache_bench import tables
from tools.cache_bench.cases import Case, Result, Run
from tools.cache_bench.goals import GOALS


def cells(table: str) -> list[list[str]]:
    """The rows of a markdown table, its head first."""
    head, line, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert set("".join(line)) == {"-"}
    assert all(len(row) == len(head) for row in rows)
    return [head, *rows]


def test_goals_stand_beside_vllm_and_simpler_caches() -> None:
    results = GivenResults(lambda run: result(hit=0.9 if run == Run(run.case) else 0.1, p50=0.02, mean=0.05))
    head, first, *others = cells(tables.goal_table(results))
    assert head == [
        *("trace, model, KV GiB", "vLLM", "goal", "ours", "static", "all-global", "truncate, LRU"),
        *("preempted", "missed"),
    ]
    assert first[:4] == [
        "docqa gemma3-27b 12",
        "0.098; 142 / 276; 452",
        "≥ 0.58, ≤ 9",
        "0.900; 0.02 / 2.00 / 0.05; 100",
    ]
    assert first[4] == "0.100; 0.02 / 2.00 / 0.05; 100"
    assert first[-2:] == ["3", ""]
    assert len(others) == len(GOALS) - 1
    assert others[-1][2] == "≤ 1.01 × vLLM's time"


def test_a_cache_too_small_for_the_trace_says_so() -> None:
    rows = cells(tables.goal_table(GivenResults(lambda run: None if run.policy == "all-global" else result())))
    assert {row[5] for row in rows[1:]} == {"holds no such request"}


def test_our_own_figures_alone_take_a_run_a_goal() -> None:
    results = GivenResults(lambda run: result(hit=0.1))
    rows = cells(tables.goal_table(results, ours_only=True))
    assert results.made == [Run(goal.case) for goal in GOALS]
    assert rows[1][-1] == "hit 0.100 < 0.58"


def test_other_seeds_do_not_run_the_traces_of_the_goals() -> None:
    results = GivenResults(lambda run: result())
    rows = cells(tables.seed_table(results))
    assert {run.case.seed for run in results.made} == {1, 2, 3}
    assert len(rows) == 1 + 3 * len(GOALS)


def test_the_boundary_is_judged_against_the_best_static_split() -> None:
    def of(run: Run) -> Result:
        if run.share is not None:
            return result(hit=0.8, mean=1.0 + abs(run.share - 0.7))
        if run.partition == "static":
            return result(hit=0.4, mean=9.0)
        return result(hit=0.7, mean=1.5) if run.case.trace == "chat" else result(hit=0.79, mean=0.9)

    results = GivenResults(of)
    rows = {row[0]: row for row in cells(tables.boundary_table(results))}
    assert rows["docqa gemma3-27b 12"] == [
        *("docqa gemma3-27b 12", "0.790; 0.90", rows["docqa gemma3-27b 12"][2], "0.400; 9.00", "0.400; 9.00"),
        *("7", "200.00 (0.40%)", "ok"),
    ]
    assert rows["docqa gemma3-27b 12"][2].startswith("0.800; 1.0")
    assert rows["chat gemma3-27b 12"][-1].startswith("mean TTFT x 1.")
    assert rows["chat gemma3-27b 12"][-1].endswith("; hit x 0.87")
    assert "alternating gpt-oss-20b 4" in rows
    told = {run.expected for run in results.made if run.case == Case("docqa", "gemma3-27b", 12)}
    assert told == {None, Case("docqa", "gemma3-27b", 12).mean_length()}


def test_what_rebuilding_brings() -> None:
    results = GivenResults(lambda run: result(hit=0.5 if run.policy == "hybrid" else 0.4))
    rows = cells(tables.insurance_table(results))
    assert rows[1] == ["hybrid", "0.500; 1.00 / 2.00 / 1.20; 100", "1", "2", "3", "4"]
    assert [row[0] for row in rows[1:]] == ["hybrid", "no-rebuild", "no-tails", "no-tails-no-rebuild"]
