"""A peer without a model, for tests of the step benchmark: counts, writes down what it is asked, dies when told.

Owns: nothing but that. Must never: need more than the standard library.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tools.step_bench import worker_loop


class FakePeer:
    """Draws 100, 101, ... from a prompt; the file it "loads" is where it writes its name for every step."""

    def __init__(self, model: Path, threads: int, options: dict[str, Any]) -> None:
        """``options``: its ``name``, and ``dies_at``, the step that ends the process."""
        if options.get("no_model"):
            raise RuntimeError("there is no such model")
        self.versions = {options["name"]: str(threads)}
        self._file = model
        self._name = options["name"]
        self._dies_at = options.get("dies_at")
        self._steps = 0

    def start(self, prompts: list[list[int]]) -> None:
        """Counts from the start again."""
        self._note(f"start {len(prompts)}x{len(prompts[0])}")
        self._steps = 0

    def step(self) -> int:
        """Prints to stdout, as libraries do."""
        if self._steps == self._dies_at:
            sys.exit("out of luck")
        print("chatter")  # noqa: T201
        self._note("step")
        self._steps += 1
        return 99 + self._steps

    def stop(self) -> None:
        """Writes that down."""
        self._note("stop")

    def prefill(self, prompt: list[int]) -> int:
        """The first id of the prompt."""
        self._note(f"prefill {len(prompt)}")
        return prompt[0]

    def _note(self, what: str) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{self._name} {what}\n")


if __name__ == "__main__":
    worker_loop.run(FakePeer)
