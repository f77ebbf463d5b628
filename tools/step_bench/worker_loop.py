"""The worker's side of a measurement: answers the parent's commands, one JSON object a line.

Owns: pinning, timing, and that a turn ends only when this process is idle. Must never: need more than the standard
library; it runs in every peer's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from tools.step_bench import machine

IDLE_SECONDS = 0.02
MOST_IDLE_WAITS = 500


class Peer(Protocol):
    """A model that is loaded, greedy, and told what to do one step at a time."""

    versions: dict[str, str]

    def start(self, prompts: list[list[int]]) -> None:
        """Prefills the prompts, which have one length, so that the next ``step`` decodes all of them at once.

        Each must have its own K/V; a peer may copy those of the first prompt.
        """
        ...

    def step(self) -> int:
        """One decode step of all sequences; the first one's next token, the one the prefill gave first."""
        ...

    def stop(self) -> None:
        """Drops all sequences."""
        ...

    def prefill(self, prompt: list[int]) -> int:
        """Computes a prompt from nothing, and drops it; the token after it."""
        ...


def run(load: Callable[[Path, int, dict[str, Any]], Peer]) -> None:
    """The whole life of a worker: pin, load, serve until stdin ends.

    ``load`` gets the model's folder or file, the number of threads, and the peer's own options.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--cores", required=True, help="numbers, comma-separated")
    parser.add_argument("--options", default="{}", help="a JSON object")
    arguments = parser.parse_args()
    # Libraries print to stdout as they like; answers go to a copy of it that only this module has.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    cores = [int(core) for core in arguments.cores.split(",")]
    machine.pin(cores)
    peer = load(arguments.model, len(cores), json.loads(arguments.options))
    serve(peer, cores, sys.stdin, answers)


def serve(peer: Peer, cores: list[int], questions: TextIO, answers: TextIO) -> None:
    """Answers each line of ``questions``; begins by telling the peer's versions."""
    _answer(answers, {"versions": peer.versions})
    for line in questions:
        question = json.loads(line)
        _answer(answers, _do(peer, cores, question))


def _do(peer: Peer, cores: list[int], question: dict[str, Any]) -> dict[str, Any]:
    if question["do"] == "start":
        peer.start(question["prompts"])
        return {}
    if question["do"] == "steps":
        # What ran before left the caches cold; and an engine that runs one step ahead has its first step done already.
        first = [peer.step() for _ in range(question["untimed"])]
        return _timed(peer.step, question["timed"], cores, first)
    if question["do"] == "prefill":
        return _timed(lambda: peer.prefill(question["prompt"]), 1, cores, [])
    if question["do"] == "stop":
        peer.stop()
        return {}
    raise ValueError(f"unknown command {question['do']!r}")


def _timed(step: Callable[[], int], count: int, cores: list[int], tokens: list[int]) -> dict[str, Any]:
    """Runs ``step`` ``count`` times.

    ``seconds`` of each, and CPU seconds this process took for it; ``tokens`` after those given; the share of the cores'
    time that ``others`` took.
    """
    seconds, cpu_seconds = [], []
    busy = machine.busy_seconds(cores)
    for _ in range(count):
        used, before = time.process_time(), time.perf_counter()
        tokens.append(step())
        seconds.append(time.perf_counter() - before)
        cpu_seconds.append(time.process_time() - used)
    others = None
    if busy is not None:
        busy = (machine.busy_seconds(cores) or busy) - busy
        others = max(0.0, busy - sum(cpu_seconds)) / sum(seconds) / len(cores)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens, "others": others}


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    """Answers once this process is idle: steps in flight and spinning threads must not reach into the next turn."""
    for _ in range(MOST_IDLE_WAITS):
        used = time.process_time()
        time.sleep(IDLE_SECONDS)
        if time.process_time() - used < IDLE_SECONDS / 10:
            break
    answers.write(json.dumps(content) + "\n")
    answers.flush()
