"""What the cost tool prints for people: one kernel in full, or several side by side.

Owns: the wording, which says of each figure whether it was read from the compiler or comes from a model. Must never:
compute a figure that ``measured`` does not define.
"""

from __future__ import annotations

from tools.tpu_costs.chips import MIB, chip_of
from tools.tpu_costs.measure import DoesNotCompile
from tools.tpu_costs.measured import Cost
from tools.tpu_costs.schedule import GRANULE_BYTES, Loop

LEGEND = """\
READ   from the compiler's final schedule: bundles of each loop, slots by unit, spills, VMEM, copies of static size, and
       whether and how fast it compiles.
MODEL  how often each loop turns (from the kernel's source; conditional code counts as run, but for the pipeline's
       prologue), bytes, time = max(bytes / HBM bandwidth, bundles / clock). Not in it: latency and efficiency of
       copies, launch, stalls. Nothing here was measured on a TPU."""


def describe(cost: Cost | DoesNotCompile) -> str:
    """One kernel in full."""
    if isinstance(cost, DoesNotCompile):
        return f"{cost.case.kernel} on {cost.case.topology}: does not compile: {cost.reason}"
    case, chip, work = cost.case, chip_of(cost.case.topology), cost.work
    memory = (
        f"VMEM {cost.schedule.vmem_bytes / MIB:.2f} of {chip.vmem_bytes // MIB} MiB, "
        f"SMEM {cost.schedule.smem_bytes / MIB:.3f} MiB"
    )
    counted = f"{work.counts.bundles:.0f} a step, {cost.bundles_per_sequence:.0f} a sequence"
    moved = f"{work.step_bytes:.0f} a step, floor {work.floor_bytes:.0f}"
    parts = f"max(HBM {cost.hbm_seconds * 1e6:.2f}, bundles {cost.compute_seconds * 1e6:.2f})"
    filled = f"with the pipeline's fill of {cost.fill_seconds * 1e6:.2f} us {cost.floor_ratio_with_fill:.3f}"
    lines = [
        f"{case.kernel} on {case.topology}: {case.geometry}, blocks of {case.block_size},",
        f"  {case.batch} sequences with {case.context} tokens before, {case.chunk} new ones each",
        f"READ   compiled in {cost.compiled.compile_seconds:.2f} s of processor time; {memory}",
        f"READ   aliased {cost.compiled.alias_bytes} bytes, temporary {cost.compiled.temp_bytes}",
        *_loops(cost, cost.schedule.code),
        f"READ   hot loops ({cost.hot_bundles} bundles): {_units(cost.hot_utilisation)}",
        f"READ   spill stores {100 * cost.spill_share:.0f} % of the hot loops' stores",
        f"MODEL  the whole step, units: {_units(cost.utilisation)}",
        f"MODEL  bundles: {counted}; bytes: {moved}; keys visited / needed {work.visited_ratio:.2f}",
        f"MODEL  time: {cost.seconds * 1e6:.2f} us = {parts}; binds: {cost.binds}",
        f"MODEL  time / HBM floor: {cost.floor_ratio:.3f}; {filled}",
    ]
    if work.flops:
        peak = work.flops / chip.bf16_flops_per_second
        lines.append(f"MODEL  useful FLOPs: {100 * peak / cost.seconds:.0f} % of peak")
    return "\n".join(lines)


def _units(utilisation: dict[str, float]) -> str:
    return ", ".join(f"{unit} {share:.0f}%" for unit, share in utilisation.items() if share >= 0.5)


def _loops(cost: Cost, loop: Loop) -> list[str]:
    counts = cost.work.counts.of_bundle
    what = "whole code" if not loop.depth else f"loop of depth {loop.depth}"
    copies = cost.schedule.copies_in(loop.start, loop.end)
    static = sum(copy.granules for copy in copies) * GRANULE_BYTES
    size = f"{loop.bundles} bundles, {loop.own_bundles} outside inner loops"
    inner = [line for other in loop.loops for line in _loops(cost, other)]
    turns = counts[loop.start] if loop.bundles else 0
    read = f"{what}: {size}, {len(copies)} copies of {static} bytes"
    return [f"READ   {'  ' * loop.depth}{read}; MODEL: {turns:.0f} turns", *inner]


def table(costs: list[Cost | DoesNotCompile]) -> str:
    """Several kernels, one a line of Markdown."""
    lines = [
        "| kernel | chip | bundles a sequence | bytes / floor | time / floor | with fill | binds | compiled in s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        case = cost.case
        if isinstance(cost, DoesNotCompile):
            lines.append(f"| {case.kernel} | {case.topology} | does not compile: {cost.reason} | | | | | |")
            continue
        lines.append(
            f"| {case.kernel} | {case.topology} | {cost.bundles_per_sequence:.0f} | "
            f"{cost.work.step_bytes / cost.work.floor_bytes:.2f} | {cost.floor_ratio:.2f} | "
            f"{cost.floor_ratio_with_fill:.2f} | {cost.binds} | {cost.compiled.compile_seconds:.1f} |"
        )
    return "\n".join(lines)
