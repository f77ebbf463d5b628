"""Train the demo model and write its folder.

    python tools/train_demo_model.py RUN [--seed N] [--export FOLDER]

RUN is a folder for checkpoints: a run that was stopped goes on from the last one when the same command is given again.
Training takes about an hour on one CPU core; each line of progress gives the loss and, for each kind of question,
the share of answers that were exactly right. --export writes the model folder at the end (hkv_jax/demo_model for the
bundled one); tools/score_demo_model.py then fills in its model card.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.demo_training import curriculum, loop, model  # noqa: E402

SEED = 1
"""Of the bundled model."""


def main() -> int:
    """Parse the command line, train, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of this run's checkpoints; made where it does not exist")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the weights and the documents (default {SEED})")
    parser.add_argument("--export", type=Path, help="write the model folder here at the end")
    options = parser.parse_args()
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)

    shape = model.default_shape()
    stages = ", ".join(f"{stage.tokens / 1e6:.1f} M tokens of {stage.length}" for stage in curriculum.STAGES)
    say(f"training on {stages}")
    state = loop.train(options.run, shape, options.seed, say)
    if options.export is not None:
        model.save(options.export, shape, state.parameters)
        curve = {"seed": options.seed, "curve": state.curve}
        (options.export / "training_curve.json").write_text(json.dumps(curve) + "\n", encoding="utf-8")
        say(f"wrote {options.export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
