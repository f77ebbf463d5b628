"""The tables of the step benchmark, and everything behind them as JSON.

Owns: ratios, shares and how they are printed. Must never: measure.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from tools.step_bench.points import GOALS, HKV_JAX, TRANSFORMERS, Outcome, Point, best_llama, same_tokens

DISTURBED = 0.1
"""Share of the cores others may take before the table says so."""


@dataclasses.dataclass(frozen=True)
class ModelBytes:
    """What a decode step has to read, in bytes: all weights once, and the K/V every sequence still sees.

    ``groups`` has, for each attention group, its bytes a token over all of its layers, and its window (``None``: all).
    """

    weights: int
    groups: tuple[tuple[int, int | None], ...]

    def of_step(self, point: Point) -> int:
        """Bytes of one decode step."""
        sequence = sum(
            size * (point.tokens if window is None else min(window, point.tokens)) for size, window in self.groups
        )
        return self.weights + point.batch * sequence


@dataclasses.dataclass
class CoreResults:
    """Everything measured on one set of cores.

    ``bandwidth``: GB/s before and after. ``outcomes``: by point, then by peer.
    """

    cores: list[int]
    share_hardware: bool
    bandwidth: list[float] = dataclasses.field(default_factory=list)
    outcomes: dict[Point, dict[str, Outcome]] = dataclasses.field(default_factory=dict)

    @property
    def best_bandwidth(self) -> float:
        """GB/s; the limit is what is possible."""
        return max(self.bandwidth)


@dataclasses.dataclass
class Report:
    """A whole run.

    ``missing``: peers that could not take part, and why. ``versions``: of every library of the peers that did.
    """

    model: str
    bytes: ModelBytes
    cpu: dict[str, Any]
    load_average: float
    peers: list[str]
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    results: list[CoreResults] = dataclasses.field(default_factory=list)

    def markdown(self) -> str:
        """What was measured where, and a table for each number of cores."""
        return "\n".join([*self._header(), *(line for result in self.results for line in self._section(result))])

    def json(self) -> dict[str, Any]:
        """Every figure, the rounds included."""
        return {
            "model": self.model,
            "weights_bytes": self.bytes.weights,
            "cpu": self.cpu,
            "load_average": self.load_average,
            "versions": self.versions,
            "missing": self.missing,
            "cores": [self._core_json(result) for result in self.results],
        }

    def _header(self) -> list[str]:
        lacking = self.cpu.get("missing") or []
        versions = [f"{name} {version}" for name, version in self.versions.items() if name != "llama.cpp features"]
        lines = [
            f"{self.model}, bf16, weights {self.bytes.weights / 1e6:.0f} MB. CPU: {self.cpu.get('model')}, with "
            f"{', '.join(self.cpu.get('flags') or ['none of the flags that matter'])}"
            + (f"; without {', '.join(lacking)}" if lacking else "")
            + ("." if self.cpu.get("pinned", True) else "; this system cannot pin processes to cores."),
            f"{', '.join(versions)}. Load average at the start {self.load_average:.1f}.",
            "Tokens/s: medians of rounds in which the peers took turns. Ratios are ours to theirs, goals in brackets.",
        ]
        lines += [f"{peer}: not measured: {reason}" for peer, reason in self.missing.items()]
        return [*lines, ""]

    def _section(self, result: CoreResults) -> list[str]:
        several = len(result.cores) > 1
        shared = ", threads of one physical core" if result.share_hardware else ""
        limit = f"; memory is read at {result.best_bandwidth:.1f} GB/s" if result.bandwidth else ""
        title = [f"**{len(result.cores)} core{'s' * several}**{shared}{limit}.", ""]
        columns = ["point", *self.peers, "/ transformers", "/ llama.cpp, its best", "of bandwidth"]
        rows = [self._row(result, point, outcomes) for point, outcomes in result.outcomes.items()]
        return [*title, *_table([columns, *rows]), "", *_remarks(result), ""]

    def _row(self, result: CoreResults, point: Point, outcomes: dict[str, Outcome]) -> list[str]:
        figures = _figures(point, outcomes)
        rates: dict[str, float] = figures["tokens_per_second"]
        goal = GOALS.get(point)
        share = self._share(result, point, outcomes)
        return [
            str(point),
            *(_rounded(rates[peer]) if peer in rates else "-" for peer in self.peers),
            _ratio(figures["to_transformers"], goal.transformers if goal else None),
            _ratio(figures["to_llama"], goal.llama if goal else None),
            "-" if share is None else f"{share:.0%}",
        ]

    def _share(self, result: CoreResults, point: Point, outcomes: dict[str, Outcome]) -> float | None:
        """What a decode step of ours reads each second, as a share of what the cores can read."""
        if not point.decodes or not result.bandwidth or HKV_JAX not in outcomes:
            return None
        return self.bytes.of_step(point) / outcomes[HKV_JAX].seconds / 1e9 / result.best_bandwidth

    def _core_json(self, result: CoreResults) -> dict[str, Any]:
        points = {
            str(point): {
                **_figures(point, outcomes),
                "goal": dataclasses.asdict(GOALS[point]) if point in GOALS else None,
                "step_bytes": self.bytes.of_step(point) if point.decodes else None,
                "share_of_bandwidth": self._share(result, point, outcomes),
                "peers": {peer: dataclasses.asdict(outcome) for peer, outcome in outcomes.items()},
            }
            for point, outcomes in result.outcomes.items()
        }
        described = {"cores": result.cores, "share_hardware": result.share_hardware, "bandwidth": result.bandwidth}
        return {**described, "points": points}


def _figures(point: Point, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Tokens/s by peer, and our ratios where both sides were measured."""
    rates = {peer: outcome.tokens_per_second(point) for peer, outcome in outcomes.items()}
    ours, theirs, llama = rates.get(HKV_JAX), rates.get(TRANSFORMERS), best_llama(rates)
    return {
        "tokens_per_second": rates,
        "to_transformers": ours / theirs if ours and theirs else None,
        "to_llama": ours / llama if ours and llama else None,
    }


def _ratio(ratio: float | None, goal: float | None) -> str:
    if ratio is None:
        return "-"
    if goal is None:
        return f"{ratio:.2f}"
    # Judged as it is printed.
    met = round(ratio, 2) >= goal
    return f"{ratio:.2f} ({goal:g})" if met else f"**{ratio:.2f}** ({goal:g}, missed)"


def _rounded(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


def _remarks(result: CoreResults) -> list[str]:
    """How far the greedy tokens of the peers agree, and whether anything disturbed the run."""
    agreement = _agreement(result)
    lines = []
    if agreement:
        counts = ", ".join(f"{peer} {same} of {total}" for peer, (same, total) in agreement.items())
        lines.append(f"Greedy tokens equal to those of {TRANSFORMERS}, up to the first that differs: {counts}.")
    turns = [share for outcomes in result.outcomes.values() for one in outcomes.values() for share in one.others]
    if turns:
        disturbed = sum(share > DISTURBED for share in turns)
        warning = "**The machine was busy; do not quote these figures.** " if statistics.mean(turns) > DISTURBED else ""
        lines.append(
            f"{warning}Other processes took {statistics.mean(turns):.0%} of the cores on average, more than "
            f"{DISTURBED:.0%} in {disturbed} of {len(turns)} turns."
        )
    return lines


def _agreement(result: CoreResults) -> dict[str, tuple[int, int]]:
    """By peer: tokens that are those of transformers, and tokens compared."""
    counts: dict[str, tuple[int, int]] = {}
    for point, outcomes in result.outcomes.items():
        reference = outcomes.get(TRANSFORMERS)
        for peer, outcome in outcomes.items():
            if reference is not None and outcome is not reference:
                same, total = counts.get(peer, (0, 0))
                same += same_tokens(point, outcome.tokens, reference.tokens)
                counts[peer] = (same, total + len(outcome.tokens))
    return counts


def _table(rows: list[list[str]]) -> list[str]:
    """A Markdown table that can be read as it is, too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
