"""Train the demo model and write its folder.

    python tools/train_demo_model.py RUN [--seed N] [--export FOLDER]

RUN is a folder for checkpoints: a run that was stopped (Ctrl-C ends it after the step it is in) goes on from there when
the same command is given again. Training takes about an hour and a quarter on one CPU core; each line of progress gives
the loss and, for each kind of question, the share of answers that were exactly right. --export writes the model folder
at the end (hkv_jax/demo_model for the bundled one); tools/score_demo_model.py then fills in its model card.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
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
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, is {options.seed}")
    for folder in filter(None, (options.run, options.export)):
        # Now, not at the first checkpoint or after the last step.
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"{folder}: {error.strerror}; name a folder that can be written")
        if not os.access(folder, os.W_OK):
            parser.error(f"{folder} cannot be written; name another folder")
    started, stopped = time.monotonic(), threading.Event()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)

    shape = model.default_shape()

    def stop(*_: object) -> None:
        say("stopping after this step; Ctrl-C again to lose it")
        stopped.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    stages = ", ".join(f"{stage.tokens / 1e6:.1f} M tokens of {stage.length}" for stage in curriculum.STAGES)
    say(f"training on {stages}")
    state = loop.train(options.run, shape, options.seed, say, is_stopped=stopped.is_set)
    if stopped.is_set():
        say(f"stopped at step {state.step}; the same command goes on from there")
        return 130
    if options.export is not None:
        model.save(options.export, shape, state.parameters)
        curve = {"seed": options.seed, "curve": state.curve}
        (options.export / "training_curve.json").write_text(json.dumps(curve) + "\n", encoding="utf-8")
        say(f"wrote {options.export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
