"""The prefix cache on request traces: ours beside vLLM's figures and beside simpler ways of keeping a cache.

    python tools/bench_cache.py [goals] [seeds] [boundary] [rebuild] [--jobs N] [--ours-only] [--results FILE]

Every run replays a trace through the engine's own scheduler and cache in virtual time (tools/simulate_cache.py), with
8,192 tokens a step and up to 1,024 sequences; nothing is tuned to a trace. Tables go to stdout as markdown, progress to
stderr.

    goals     each trace, model and memory of benchmarks/vllm.json that has a goal: vLLM, ours, the boundary at its
              static default, no windows at all, and tails that are only truncated, in LRU order
    seeds     the same kinds of traffic from three other seeds
    boundary  the moving boundary against the best static split (found by trying), the default one, and one that is told
              the mean length; with traffic that alternates between chats and documents
    rebuild   tokens computed for a prefix whose sliding tail is gone, by model; and what that brings on docqa

All of it takes some minutes; --results keeps what was measured, and makes only what is missing from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.cache_bench import tables  # noqa: E402
from tools.cache_bench.results import Results, RunFailedError  # noqa: E402

SECTIONS: dict[str, tuple[tuple[str, Callable[[Results], str]], ...]] = {
    "goals": (("Against vLLM, and against simpler caches. " + tables.TRIPLE, tables.goal_table),),
    "seeds": (("Other seeds. " + tables.TRIPLE, tables.seed_table),),
    "boundary": (("The moving boundary against static ones. " + tables.PAIR, tables.boundary_table),),
    "rebuild": (
        ("Prompt tokens computed for a question to a cached document whose tail is gone.", tables.rebuild_table),
        ("docqa, gpt-oss-20b, 4 GiB. " + tables.TRIPLE, tables.insurance_table),
    ),
}
"""What stands above a table, and the table."""


def tell(line: str) -> None:
    """Progress, for people."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process (default: 1)")
    parser.add_argument("--ours-only", action="store_true", help="goals: nothing but our own figures beside vLLM's")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="what was measured before is taken from it, what is new is added"
    )
    args = parser.parse_args()
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown or args.jobs < 1:
        parser.error(f"no section is called {unknown[0]}" if unknown else "--jobs must be at least 1")
    results = Results(args.jobs, tell, args.results)
    try:
        _print_sections(args, results)
    except RunFailedError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def _print_sections(args: argparse.Namespace, results: Results) -> None:
    for name in args.sections or SECTIONS:
        for head, make in SECTIONS[name]:
            ours_only = make is tables.goal_table and args.ours_only
            table = tables.goal_table(results, ours_only=True) if ours_only else make(results)
            print(f"{head}\n\n{table}\n", flush=True)


if __name__ == "__main__":
    main()
