"""The tables of docs/benchmarks.md: every figure that the kernels must show, beside its goal.

Owns: which cases, which goals. Must never: compute a figure itself.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Sequence

from tools.tpu_costs.cases import CHUNK, SHAPES, Case, default_block_size
from tools.tpu_costs.chips import CHIPS
from tools.tpu_costs.measure import DoesNotCompile, Measured, measure_loads
from tools.tpu_costs.measured import Cost

STACKED_RPA = {"gemma-3-27b-tp8": 609, "gemma-3-1b": 371, "gpt-oss-20b": 407, "gemma-4-31b-local": 5955}
"""Bundles a sequence on v6e of tpu-inference's stacked kernel, measured before with the same reading and model."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """At most this: time over the floor in the steady state, and with the pipeline's fill."""

    steady: float
    filled: float | None = None

    def verdict(self, cost: Measured) -> str:
        """The goals in brackets, and which of them are missed."""
        if isinstance(cost, DoesNotCompile):
            return "missed"
        missed = cost.floor_ratio > self.steady or (
            self.filled is not None and cost.floor_ratio_with_fill > self.filled
        )
        wanted = f"{self.steady:.2f}" + (f", {self.filled:.2f}" if self.filled is not None else "")
        return f"{wanted}{' missed' if missed else ''}"


WINDOWED = {
    "gemma-3-27b-tp8": (64, Goal(1.10, 1.15)),
    "gemma-3-1b": (32, Goal(1.10, 1.16)),
    "gpt-oss-20b": (16, Goal(1.18, 1.25)),
    "gemma-4-31b-local": (64, Goal(1.08, 1.14)),
    "gemma-4-31b-local, P 32": (32, Goal(1.06, 1.08)),
}
TPU7X_GPT_OSS = Goal(1.9)
GLOBAL = ("llama-3.1-8b", "gemma-4-31b-global", "gpt-oss-20b")
GLOBAL_GOAL = Goal(1.05)


def shape_name(name: str) -> str:
    """Without what is not part of the shape."""
    return name.partition(",")[0]


def windowed_cases() -> list[tuple[str, Case, Goal]]:
    """Batch 64 on three chips."""
    return [
        (name, Case("windowed", SHAPES[shape_name(name)], CHIPS[chip].topology, block), _goal(name, chip, goal))
        for chip in ("v6e", "v5e", "tpu7x")
        for name, (block, goal) in WINDOWED.items()
    ]


def _goal(name: str, chip: str, goal: Goal) -> Goal:
    return TPU7X_GPT_OSS if (name, chip) == ("gpt-oss-20b", "tpu7x") else goal


def small_batch_cases() -> list[tuple[str, Case, Goal]]:
    """Batch 16, where the fill weighs more."""
    found = []
    for chip in ("v6e", "v5e", "tpu7x"):
        for name, most in (("gemma-3-27b-tp8", 1.15), ("gemma-3-1b", 1.15), ("gpt-oss-20b", 1.25)):
            if (name, chip) == ("gpt-oss-20b", "tpu7x"):
                continue
            limit = 1.17 if chip == "tpu7x" else most
            case = Case("windowed", SHAPES[name], CHIPS[chip].topology, WINDOWED[name][0], batch=16)
            found.append((name, case, Goal(limit, limit)))
    return found


def context_cases() -> list[tuple[str, Case]]:
    """One windowed layer from 1k to 128k tokens."""
    block = WINDOWED["gemma-3-27b-tp8"][0]
    geometry, topology = SHAPES["gemma-3-27b-tp8"], CHIPS["v6e"].topology
    return [
        (f"{length // 1024}k", Case("windowed", geometry, topology, block, context=length))
        for length in (1024, 8192, 32768, 131072)
    ]


def global_cases() -> list[tuple[str, Case, Goal]]:
    """Contexts of 32k and 128k, blocks of 64 and of 128."""
    return [
        (f"{name}, {length // 1024}k, P {block}", _global_case(name, chip, length, block), GLOBAL_GOAL)
        for chip in ("v6e", "v5e")
        for name in GLOBAL
        for length in (32768, 131072)
        for block in (64, 128)
    ]


def _global_case(name: str, chip: str, length: int, block: int) -> Case:
    geometry = dataclasses.replace(SHAPES[name], window=None)
    return Case("paged", geometry, CHIPS[chip].topology, block, context=length)


def peer_cases() -> list[tuple[str, Case]]:
    """jax's own kernels on the same shapes."""
    shapes = [(name, SHAPES[name]) for name in (*STACKED_RPA, "gemma-4-31b-global", "llama-3.1-8b")]
    return [
        (name, Case(kernel, geometry, CHIPS["v6e"].topology, 128))
        for name, geometry in shapes
        for kernel in ("jax-ragged", "jax-paged")
    ]


def prefill_cases() -> list[tuple[str, Case]]:
    """A chunk of 2,048 tokens at 32k, windowed and global, and its writes."""
    found = []
    for name in ("gemma-3-27b-tp8", "gemma-3-1b", "gpt-oss-20b", "gemma-4-31b-local"):
        geometry = SHAPES[name]
        case = Case(
            "windowed-prefill", geometry, CHIPS["v6e"].topology, default_block_size(geometry), batch=1, chunk=CHUNK
        )
        found.append((name, case))
        if name == "gemma-3-27b-tp8":
            found.append((name, dataclasses.replace(case, kernel="kv-update")))
    for name in ("gemma-3-27b-tp8", "llama-3.1-8b", "gpt-oss-20b"):
        case = _global_case(name, "v6e", 32768, 128)
        found.append((f"{name}, global", dataclasses.replace(case, kernel="paged-prefill", batch=1, chunk=CHUNK)))
    return found


INTEGER_SHAPES = {
    "windowed": ("gemma-3-27b-tp8", "gemma-3-1b", "gpt-oss-20b", "gemma-4-31b-local"),
    "paged": ("llama-3.1-8b", "gemma-4-31b-global"),
    "windowed-prefill": ("gemma-3-27b-tp8",),
    "paged-prefill": ("llama-3.1-8b",),
}


def integer_cases() -> list[tuple[str, Case]]:
    """Each shape in bfloat16 and, right after, in int8, at the block size that the engine would choose for each."""
    pairs = []
    for chip in ("v5e", "v6e"):
        for kernel, names in INTEGER_SHAPES.items():
            for name in names:
                for dtype in ("bfloat16", "int8"):
                    geometry = dataclasses.replace(SHAPES[name], dtype=dtype)
                    chunk, batch = (CHUNK, 1) if kernel.endswith("prefill") else (1, 64)
                    block = default_block_size(geometry)
                    case = Case(kernel, geometry, CHIPS[chip].topology, block, batch=batch, chunk=chunk)
                    pairs.append((f"{name}, {kernel}", case))
    return pairs


def integer_table(pairs: Sequence[tuple[str, Case]], costs: Sequence[Measured]) -> str:
    """bfloat16 beside int8."""
    lines = [
        "| shape, kernel | chip | P | MB a step | bundles a sequence | binds | µs a step | time of bfloat16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for i in range(0, len(pairs), 2):
        wide, narrow = costs[i], costs[i + 1]
        case, name = pairs[i][1], pairs[i][0]
        chip = case.topology.partition(":")[0]
        blocks = f"{case.block_size} → {pairs[i + 1][1].block_size}"
        if isinstance(wide, DoesNotCompile) or isinstance(narrow, DoesNotCompile):
            reasons = " / ".join(cost.reason for cost in (wide, narrow) if isinstance(cost, DoesNotCompile))
            lines.append(f"| {name} | {chip} | {blocks} | {reasons} | | | | |")
            continue
        figures = [
            (f"{c.work.step_bytes / 1e6:,.1f}", f"{c.bundles_per_sequence:,.0f}", c.binds, f"{c.seconds * 1e6:,.1f}")
            for c in (wide, narrow)
        ]
        both = " | ".join(" → ".join(column) for column in zip(*figures, strict=True))
        lines.append(f"| {name} | {chip} | {blocks} | {both} | {narrow.seconds / wide.seconds:.2f} |")
    return "\n".join(lines)


def measure_all(cases: Sequence[Case], processes: int) -> list[Measured]:
    """Measures cases, some at a time, in their order; those that differ in their load alone share a compilation."""
    by_kernel: dict[Case, list[Case]] = {}
    for case in cases:
        key = dataclasses.replace(case, context=0, batch=0) if case.chunk == 1 else case
        by_kernel.setdefault(key, []).append(case)
    # The longest first: its tables are the largest.
    groups = [sorted(group, key=lambda case: (-case.context, -case.batch)) for group in by_kernel.values()]
    found: dict[Case, Measured] = {}
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        for costs in pool.map(measure_loads, groups):
            found |= {cost.case: cost for cost in costs}
    return [found[case] for case in cases]


def decode_table(rows: Sequence[tuple[str, Case, Goal]], costs: Sequence[Measured]) -> str:
    """Ratios beside goals."""
    lines = [
        "| shape | chip | bundles / sequence | bytes / floor | time / floor | filled | goals | binds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, case, goal), cost in zip(rows, costs, strict=True):
        chip = case.topology.partition(":")[0]
        if isinstance(cost, DoesNotCompile):
            lines.append(f"| {name} | {chip} | does not compile: {cost.reason} | | | | {goal.verdict(cost)} | |")
            continue
        moved = cost.work.step_bytes / cost.work.floor_bytes
        lines.append(
            f"| {name} | {chip} | {cost.bundles_per_sequence:,.0f} | {moved:.3f} | {cost.floor_ratio:.3f} | "
            f"{cost.floor_ratio_with_fill:.3f} | {goal.verdict(cost)} | {cost.binds} |"
        )
    return "\n".join(lines)


def context_table(rows: Sequence[tuple[str, Case]], costs: Sequence[Measured]) -> str:
    """Bytes by context."""
    lines = ["| context | bytes a step | bundles a sequence | time / floor |", "|---|---|---|---|"]
    for (name, _), cost in zip(rows, costs, strict=True):
        assert isinstance(cost, Cost)
        lines.append(
            f"| {name} | {cost.work.step_bytes:,.0f} | {cost.bundles_per_sequence:,.0f} | {cost.floor_ratio:.3f} |"
        )
    return "\n".join(lines)


def peer_table(rows: Sequence[tuple[str, Case]], costs: Sequence[Measured], ours: dict[str, Measured]) -> str:
    """Ours beside jax's kernels and the stacked kernel's bundles."""
    lines = [
        "| shape (v6e, 32k, batch 64) | kernel | bundles a sequence | bytes / floor | time / floor | binds |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for name, _ in rows):
        beside = [("**ours**", ours[name])] if name in ours else []
        beside += [(case.kernel, cost) for (of, case), cost in zip(rows, costs, strict=True) if of == name]
        for kernel, cost in beside:
            if isinstance(cost, DoesNotCompile):
                lines.append(f"| {name} | {kernel} | does not compile: {cost.reason} | | | |")
                continue
            moved = cost.work.step_bytes / cost.work.floor_bytes
            lines.append(
                f"| {name} | {kernel} | {cost.bundles_per_sequence:,.0f} | {moved:.2f} | {cost.floor_ratio:.2f} | "
                f"{cost.binds} |"
            )
        if name in STACKED_RPA:
            lines.append(f"| {name} | stacked RPA (measured before) | {STACKED_RPA[name]:,} | | | |")
    return "\n".join(lines)


def prefill_table(rows: Sequence[tuple[str, Case]], costs: Sequence[Measured]) -> str:
    """Time of a chunk, and what the units do meanwhile."""
    lines = [
        "| shape | kernel | bundles | us | of peak | MXU / VALU / EUP | spills | keys / needed | binds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, case), cost in zip(rows, costs, strict=True):
        if isinstance(cost, DoesNotCompile):
            lines.append(f"| {name} | {case.kernel} | does not compile: {cost.reason} | | | | | | |")
            continue
        units = " / ".join(f"{cost.hot_utilisation[unit]:.0f} %" for unit in ("MXU", "VALU", "EUP"))
        peak = cost.work.flops / CHIPS[case.topology.partition(":")[0]].bf16_flops_per_second / cost.seconds
        lines.append(
            f"| {name} | {case.kernel} | {cost.work.counts.bundles:,.0f} | {cost.seconds * 1e6:.1f} | "
            f"{100 * peak:.0f} % | "
            f"{units} | {100 * cost.spill_share:.0f} % | {cost.work.visited_ratio:.2f} | {cost.binds} |"
        )
    return "\n".join(lines)
