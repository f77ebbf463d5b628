"""The tables of the cache benchmark, as markdown.

Owns: what stands beside what. Must never: run a simulation itself (it asks ``Results``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tools.cache_bench.cases import Case, Result, Run
from tools.cache_bench.goals import GOALS, Figures, Goal, vllm_figures
from tools.cache_bench.lost_tails import LostTail
from tools.cache_bench.results import Results
from tools.cache_bench.static_search import best_static
from tools.cache_simulation.virtual_clock import StepCost

TRIPLE = "Cells: hit rate; TTFT p50 / p99 / mean, virtual s; virtual s of the whole trace (vLLM: no mean)."
PAIR = "Cells: hit rate; mean TTFT, virtual s."

SEEDS = (1, 2, 3)
DOCUMENTS = (8192, 16_384, 65_536, 122_880)
REBUILDING = ("gpt-oss-20b", "gpt-oss-120b", "gemma3-270m", "gemma3-1b", "gemma4-31b", "gemma3-27b")
ALTERNATING = tuple(
    Case("alternating", model, gib, seed=0)
    for model, gib in (
        ("gemma3-27b", 12),
        ("gemma3-27b", 30),
        ("gemma4-31b", 16),
        ("gemma4-31b", 40),
        ("gpt-oss-20b", 4),
    )
)


def goal_table(results: Results, ours_only: bool = False) -> str:
    """Every goal: vLLM's figures, ours, and with ``ours_only`` false what else could be done."""
    others: dict[str, Callable[[Case], Run]] = {}
    if not ours_only:
        others = {
            "static": lambda case: Run(case, partition="static"),
            "all-global": lambda case: Run(case, "all-global"),
            "truncate, LRU": lambda case: Run(case, "truncate-lru"),
        }
    makers = {"ours": Run, **others}
    results.make(make(goal.case) for goal in GOALS for make in makers.values())
    head = ["trace, model, KV GiB", "vLLM", "goal", *makers, "preempted", "missed"]
    rows = [head]
    for goal in GOALS:
        ours = Figures.of(results[Run(goal.case)])
        cells = [_triple_of(results.get(make(goal.case))) for make in makers.values()]
        preempted = str(results[Run(goal.case)]["preemptions"])
        missed = "; ".join(goal.missed(ours))
        rows.append([_name(goal.case), _triple(vllm_figures()[goal.case]), _goal(goal), *cells, preempted, missed])
    return _markdown(rows)


def seed_table(results: Results) -> str:
    """The same kinds of traffic from other seeds: not tuned to one."""
    makers: dict[str, Callable[[Case], Run]] = {
        "ours": Run,
        "static": lambda case: Run(case, partition="static"),
        "truncate, LRU": lambda case: Run(case, "truncate-lru"),
    }
    cases = [Case(goal.case.trace, goal.case.model, goal.case.kv_gib, seed) for seed in SEEDS for goal in GOALS]
    results.make(make(case) for case in cases for make in makers.values())
    rows = [["trace, model, KV GiB", "seed", *makers]]
    for case in sorted(cases):
        cells = [_triple(Figures.of(results[make(case)])) for make in makers.values()]
        rows.append([_name(case), str(case.seed), *cells])
    return _markdown(rows)


def boundary_table(results: Results) -> str:
    """The moving boundary against static ones: the best there is, the default, and one told the mean length."""
    head = ["trace, model, KV GiB", "moving", "best static (share)", "default static", "static, E = mean"]
    rows = [[*head, "slabs moved", "GB copied (share of time)", "against the best"]]
    cases = [*(goal.case for goal in GOALS), *ALTERNATING]
    makers: tuple[Callable[[Case], Run], ...] = (
        Run,
        lambda case: Run(case, partition="static"),
        lambda case: Run(case, partition="static", expected=min(case.mean_length(), case.max_model_len)),
    )
    results.make(make(case) for case in cases for make in makers)
    for case in cases:
        best = best_static(case, results)
        moving, default, told = (results[make(case)] for make in makers)
        share = f"{_pair(results[best])} ({best.share:.2f})"
        moved = [str(moving["slabs_moved"]), _copied(moving)]
        verdict = _verdict(Figures.of(moving), Figures.of(results[best]))
        rows.append([_name(case), _pair(moving), share, _pair(default), _pair(told), *moved, verdict])
    return _markdown(rows)


def rebuild_table(_results: Results) -> str:
    """Prompt tokens computed for a question to a document whose tail is gone, by model and length of the document."""
    rows = [["model", "R", *(f"{length:,} tokens: rebuild / truncate" for length in DOCUMENTS)]]
    for model in REBUILDING:
        cells = []
        for length in DOCUMENTS:
            tail = LostTail(model, length)
            pair = (tail.tokens_run(rebuild=True), tail.tokens_run(rebuild=False)) if tail.fits else None
            cells.append("–" if pair is None else f"{pair[0]:,} / {pair[1]:,}")
        rows.append([model, f"{LostTail(model, DOCUMENTS[0]).rebuild_tokens:,}", *cells])
    return _markdown(rows)


def insurance_table(results: Results) -> str:
    """What rebuilding brings where tails are kept, and where they are not."""
    case = Case("docqa", "gpt-oss-20b", 4)
    policies = ("hybrid", "no-rebuild", "no-tails", "no-tails-no-rebuild")
    results.make(Run(case, policy) for policy in policies)
    rows = [["policy", "cells", "resident", "rebuild", "truncate", "miss"]]
    for policy in policies:
        result = results[Run(case, policy)]
        hits = result["hits"]
        assert isinstance(hits, Mapping)
        rows.append([policy, _triple(Figures.of(result)), *map(str, hits.values())])
    return _markdown(rows)


def _verdict(moving: Figures, best: Figures) -> str:
    assert moving.mean is not None and best.mean is not None
    found = []
    if moving.mean > best.mean:
        found.append(f"mean TTFT x {moving.mean / best.mean:.2f}")
    if moving.hit < 0.94 * best.hit:
        found.append(f"hit x {moving.hit / best.hit:.2f}")
    return "; ".join(found) or "ok"


def _copied(result: Result) -> str:
    copied, seconds = result["copied_bytes"], result["virtual_s"]
    assert isinstance(copied, int) and isinstance(seconds, float)
    return f"{copied / 1e9:.2f} ({StepCost(step_ms=1e-9).seconds(0, copied) / seconds:.2%})"


def _name(case: Case) -> str:
    return f"{case.trace} {case.model} {case.kv_gib:g}"


def _goal(goal: Goal) -> str:
    if goal.hit is None:
        return f"≤ {goal.of_vllm_time:g} × vLLM's time"
    return f"≥ {goal.hit:.2f}, ≤ {goal.p50:g}"


def _triple(figures: Figures) -> str:
    """Hit; TTFT p50 / p99 / mean; virtual seconds."""
    seconds = [figures.p50, figures.p99, *([] if figures.mean is None else [figures.mean])]
    return f"{figures.hit:.3f}; {' / '.join(map(_seconds, seconds))}; {figures.virtual_s:.0f}"


def _triple_of(result: Result | None) -> str:
    return "holds no such request" if result is None else _triple(Figures.of(result))


def _pair(result: Result) -> str:
    """Hit and mean TTFT."""
    figures = Figures.of(result)
    assert figures.mean is not None
    return f"{figures.hit:.3f}; {_seconds(figures.mean)}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in others]
    return "\n".join(lines)
