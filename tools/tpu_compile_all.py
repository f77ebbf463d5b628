"""Compiles every kernel for every chip, and whole steps of Gemma 3 27B, ahead of time; prints what came out.

    python tools/tpu_compile_all.py [--chips v6e v5e v5p tpu7x] [--processes 2] [--only TEXT] [--no-steps]

At 256 sequences of 128k tokens, and chunks of 2,048 tokens. That a case compiles says that its tables fit scalar memory
and its tiles vector memory. Seconds are the processor's. No TPU is touched.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.tpu_costs.chips import CHIPS, MIB  # noqa: E402
from tools.tpu_costs.measure import compile_environment  # noqa: E402
from tools.tpu_costs.suite import cases, compile_all, pool_bytes  # noqa: E402

WRITERS = ("windowed", "paged", "kv-update")
GIB = 1 << 30


def main() -> int:
    """Prints Markdown; exit status 1 if anything does not compile, or not in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--processes", type=int, default=2, help="compilations at a time (default: 2)")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="kernels whose name has this in it (paged, int8), and no steps"
    )
    parser.add_argument("--no-steps", action="store_true", help="kernels alone")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes {options.processes} must be at least 1")
    named = {
        chip: {name: case for name, case in cases(CHIPS[chip].topology).items() if options.only in name}
        for chip in options.chips
    }
    if not named[options.chips[0]]:
        known = "\n  ".join(cases(CHIPS[options.chips[0]].topology))
        parser.error(f"--only {options.only!r}: no kernel has this in its name; there are\n  {known}")
    print("| kernel, shape | " + " | ".join(f"{chip}: s, temporary MiB" for chip in options.chips) + " |")
    print("|---|" + "---|" * len(options.chips))
    merged = {f"{name} | {chip}": case for chip, of_chip in named.items() for name, case in of_chip.items()}
    results = compile_all(merged, options.processes)
    failed = False
    for name in named[options.chips[0]]:
        cells = []
        for chip in options.chips:
            result, case = results[f"{name} | {chip}"], named[chip][name]
            in_place = result.get("alias_bytes") == (pool_bytes(case) if case.kernel in WRITERS else 0)
            failed |= not in_place
            cells.append(_cell(result, in_place))
        print(f"| {name} | " + " | ".join(cells) + " |")
    if not options.no_steps and not options.only:
        failed |= not _print_steps()
    return int(failed)


def _cell(result: dict[str, Any], in_place: bool) -> str:
    if "error" in result:
        return f"does not compile: {result['error']}"
    return f"{result['compile_seconds']:.1f}, {result['temp_bytes'] / MIB:.1f}{'' if in_place else ', NOT IN PLACE'}"


def _print_steps() -> bool:
    """Whether all steps compile, in place."""
    command = [sys.executable, "-m", "tools.tpu_costs.whole_steps"]
    run = subprocess.run(command, cwd=ROOT, env=compile_environment(), capture_output=True, text=True, check=False)
    if run.returncode:
        sys.stderr.write(f"whole steps do not compile:\n{run.stderr[-3000:]}")
        return False
    steps = json.loads(run.stdout.splitlines()[-1])
    print(
        "\n| step of Gemma 3 27B, TP 8, v6e 2x4 | s (of the processor) | arguments GiB | of them state, in place | ",
        end="",
    )
    print("temporary MiB | HBM a chip GiB | arguments |\n|---|---|---|---|---|---|---|")
    in_place = True
    for name, step in steps.items():
        step_in_place = step["alias_bytes"] >= step["state_bytes"]
        in_place &= step_in_place
        print(
            f"| {name} | {step['seconds']} ({step['processor_seconds']}) | {step['argument_bytes'] / GIB:.2f} | "
            f"{step['alias_bytes'] / GIB:.2f}{'' if step_in_place else ', NOT IN PLACE'} | "
            f"{step['temp_bytes'] / MIB:.1f} | {step['hbm_bytes'] / GIB:.2f} | "
            f"{step['num_arguments']} |"
        )
    return in_place


if __name__ == "__main__":
    sys.exit(main())
