"""Score the demo model as it is shipped, and write the tables of its model card.

    python tools/score_demo_model.py PART ... [--model FOLDER] [--documents N] [--other FOLDER] [--venv FOLDER]

Parts:
    recall        exact recall by distance, number of facts and kind of document, in the dense forward pass
    seeds         the same for --other, the model of another training seed, beside the shipped one's
    damage        what is left of recall when the model or its cache is broken, dense and through the paged engine
    transformers  greedy tokens of Hugging Face transformers on the same folder (an environment of its own is made)
    curve         the training curve that tools/train_demo_model.py wrote

Each part replaces its own section of README.md in the model folder, which is begun where there is none. Evaluation
documents have names and values that were never trained on, and ask for each fact once. Exit status 1 when a goal is
missed: recall, the other seed's distance, a damage that does not show, a token that differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hkv_jax.config import DEMO_MODEL  # noqa: E402
from tools.demo_training import card, scoring  # noqa: E402
from tools.throwaway_env import say  # noqa: E402

PARTS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "recall": scoring.write_recall,
    "seeds": scoring.write_seeds,
    "damage": scoring.write_damage,
    "transformers": scoring.write_transformers,
    "curve": scoring.write_curve,
}


def main() -> int:
    """Parse the command line and make the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=tuple(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="model folder (default: the bundled one)")
    parser.add_argument("--documents", type=int, default=12, help="documents of each kind and number of facts (12)")
    parser.add_argument("--other", type=Path, help="model folder of another training seed, for seeds")
    parser.add_argument("--venv", type=Path, help="environment to make or reuse for transformers, and keep")
    options = parser.parse_args()
    if "seeds" in options.parts and options.other is None:
        parser.error("seeds needs --other, the folder of a model trained with another seed")
    if options.documents < scoring.DAMAGED_SHARE:
        parser.error(f"--documents must be at least {scoring.DAMAGED_SHARE}, is {options.documents}")
    # Before minutes of measuring.
    for folder in filter(None, (options.model, options.other)):
        for name in ("config.json", "model.safetensors", scoring.CURVE):
            if not (folder / name).is_file():
                parser.error(f"{folder} has no {name}; name a folder that tools/train_demo_model.py wrote")
    card.prepare(options.model / scoring.CARD, options.parts)
    passed = True
    for part in options.parts:
        say(f"{part} ...")
        good = PARTS[part](options)
        say(f"{part}: {'goals met' if good else 'a goal is MISSED'}")
        passed = passed and good
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
