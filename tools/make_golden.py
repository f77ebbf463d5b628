"""Write the golden data of the model tests: tiny random checkpoints and what transformers computes with them.

    python tools/make_golden.py [FAMILY ...] [--venv FOLDER] [--output FOLDER]

Without torch and transformers in the interpreter, an environment with both is made for the run and removed again. The
same versions give the same files; the numbers of another processor may differ in the last bits. Not run by tests or CI.
The margins and damages that were checked are in record.json beside the data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.golden_families import FAMILIES  # noqa: E402
from tools.throwaway_env import has, reference_python, run_in, say  # noqa: E402


def main() -> int:
    """Parse the command line; make every family here, or in an environment that can."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "tests" / "golden" / "data", help="folder to write to")
    parser.add_argument("--venv", type=Path, help="environment to make or reuse (default: a temporary one)")
    options = parser.parse_args()
    unknown = sorted(set(options.families) - set(FAMILIES))
    if unknown:
        parser.error(f"unknown family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    if has("torch", "transformers"):
        make(options.families or list(FAMILIES), options.output)
    else:
        with reference_python((), folder=options.venv) as python:
            run_in(python, [Path(__file__), *options.families, "--output", options.output])
    return 0


def make(names: list[str], output: Path) -> None:
    """Write ``output/NAME`` for each name, and bring ``output/record.json`` up to date."""
    import torch

    from tools import golden_reference

    # Small matrices; and the order of a sum must not depend on how many cores there are.
    torch.set_num_threads(1)
    path = output / "record.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in names:
        record[name] = golden_reference.make(FAMILIES[name], output / name)
        say(f"{name}: {json.dumps(record[name])}")
        ordered = {key: record[key] for key in FAMILIES if key in record}
        versions = {"made_with": golden_reference.versions()}
        path.write_text(json.dumps(versions | ordered, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
