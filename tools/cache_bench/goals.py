"""What is asked of the cache on each trace, beside what vLLM does there.

Owns: the goals and whether a result meets them. Must never: run anything.
"""

from __future__ import annotations

import dataclasses
import functools
import json

from tools.cache_bench.cases import BENCHMARKS, Case, Result

NEAR = 1.05
"""Late first tokens and the whole run may take as long as vLLM's, or so much more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What one system did: ``hit`` of the prompt tokens were not computed; times are virtual seconds."""

    hit: float
    p50: float
    p99: float
    virtual_s: float
    mean: float | None = None

    @classmethod
    def of(cls, result: Result) -> Figures:
        """Those of a result."""
        number = {name: float(value) for name, value in result.items() if isinstance(value, int | float)}
        return cls(
            hit=number["prefix_hit_tokens"] / max(1.0, number["prompt_tokens"]),
            p50=number["ttft_p50_s"],
            p99=number["ttft_p99_s"],
            virtual_s=number["virtual_s"],
            mean=number["ttft_mean_s"],
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """Least hit rate and largest median TTFT in seconds; or the most time of the whole run, in parts of vLLM's."""

    case: Case
    hit: float | None = None
    p50: float | None = None
    of_vllm_time: float = NEAR

    def missed(self, ours: Figures) -> list[str]:
        """What is short, in words."""
        theirs = vllm_figures()[self.case]
        found = []
        if self.hit is not None and ours.hit < self.hit:
            found.append(f"hit {ours.hit:.3f} < {self.hit}")
        if self.p50 is not None and round(ours.p50, 2) > self.p50:
            found.append(f"p50 {ours.p50:.2f} > {self.p50:g} s")
        # Their figures are rounded to 0.1 s and 1 s: what would round to them is not more.
        if round(ours.p99, 1) > NEAR * theirs.p99 and ours.p99 > NEAR * (theirs.p99 + 0.05):
            found.append(f"p99 {ours.p99:.2f} > {NEAR} x {theirs.p99:g} s")
        if ours.virtual_s > self.of_vllm_time * (theirs.virtual_s + 0.5):
            found.append(f"{ours.virtual_s:.1f} virtual s > {self.of_vllm_time} x {theirs.virtual_s:g}")
        return found


GOALS = (
    Goal(Case("docqa", "gemma3-27b", 12), 0.58, 9.0),
    Goal(Case("docqa", "gemma3-27b", 30), 0.70, 0.1),
    Goal(Case("docqa", "gemma4-31b", 16), 0.57, 6.0),
    Goal(Case("docqa", "gemma4-31b", 40), 0.76, 0.05),
    Goal(Case("docqa", "gpt-oss-20b", 4), 0.57, 1.5),
    Goal(Case("chat", "gemma3-27b", 12), 0.65, 6.0),
    Goal(Case("chat", "gemma3-27b", 30), 0.84, 0.03),
    Goal(Case("chat", "gemma4-31b", 16), 0.60, 10.0),
    Goal(Case("chat", "gemma4-31b", 40), 0.77, 0.05),
    Goal(Case("chat", "gpt-oss-20b", 1), 0.68, 4.0),
    Goal(Case("mixed", "gemma3-27b", 12), of_vllm_time=0.85),
    Goal(Case("mixed", "gemma3-27b", 30), of_vllm_time=1.01),
    Goal(Case("mixed", "gemma4-31b", 16), of_vllm_time=0.85),
    Goal(Case("mixed", "gemma4-31b", 40), of_vllm_time=1.01),
    Goal(Case("mixed", "gpt-oss-20b", 4), of_vllm_time=1.01),
)


@functools.cache
def vllm_figures() -> dict[Case, Figures]:
    """What vLLM did, by case; ``benchmarks/vllm.json`` says how that was measured."""
    rows = json.loads((BENCHMARKS / "vllm.json").read_text(encoding="utf-8"))["rows"]
    return {
        Case(row["trace"], row["model"], row["kv_gib"]): Figures(
            row["hit"], row["ttft_p50_s"], row["ttft_p99_s"], row["virtual_s"]
        )
        for row in rows
    }
