"""The kernels' tables in docs/benchmarks.md: what was read from the compiler and modelled, beside the goals.

    python tools/tpu_kernel_tables.py [--only windowed small context global peers prefill int8] [--processes 2]

Each case is compiled ahead of time as tools/tpu_cost.py does; jax's own kernels in the same run, beside those of ours
that it measured. About ten minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.tpu_costs import tables  # noqa: E402
from tools.tpu_costs.measure import Measured  # noqa: E402
from tools.tpu_costs.report import LEGEND  # noqa: E402

PARTS = ("windowed", "small", "context", "global", "peers", "prefill", "int8")


def main() -> int:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--processes", type=int, default=2, help="compilations at a time (default: 2)")
    options = parser.parse_args()
    ours: dict[str, Measured] = {}
    for part in options.only:
        sys.stderr.write(f"{part} ...\n")
        print(_part(part, options.processes, ours), flush=True)
    print(f"\n```\n{LEGEND}\n```")
    return 0


def _part(part: str, processes: int, ours: dict[str, Measured]) -> str:
    if part in ("windowed", "small", "global"):
        makers = {
            "windowed": ("Windowed decode, batch 64, context 32k", tables.windowed_cases),
            "small": ("Windowed decode, batch 16", tables.small_batch_cases),
            "global": ("Global decode, batch 64", tables.global_cases),
        }
        title, make = makers[part]
        rows = make()
        costs = tables.measure_all([case for _, case, _ in rows], processes)
        for (name, case, _), cost in zip(rows, costs, strict=True):
            if case.topology.startswith("v6e") and part != "small":
                ours.setdefault(tables.shape_name(name), cost)
        return f"\n### {title}\n\n{tables.decode_table(rows, costs)}"
    if part == "peers":
        pairs = tables.peer_cases()
        costs = tables.measure_all([case for _, case in pairs], processes)
        return f"\n### Beside jax's kernels\n\n{tables.peer_table(pairs, costs, ours)}"
    if part == "context":
        pairs = tables.context_cases()
        costs = tables.measure_all([case for _, case in pairs], processes)
        return f"\n### One windowed layer by context (Gemma-3-27B TP8, v6e)\n\n{tables.context_table(pairs, costs)}"
    if part == "int8":
        pairs = tables.integer_cases()
        costs = tables.measure_all([case for _, case in pairs], processes)
        return f"\n### int8 K/V beside bfloat16, context 32k\n\n{tables.integer_table(pairs, costs)}"
    pairs = tables.prefill_cases()
    costs = tables.measure_all([case for _, case in pairs], processes)
    return f"\n### A chunk of 2,048 tokens at 32k, v6e\n\n{tables.prefill_table(pairs, costs)}"


if __name__ == "__main__":
    sys.exit(main())
