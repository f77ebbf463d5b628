"""Our engine as a peer: scheduler, tables, sampling and read-back included; no threads, no text.

Owns: driving ``Engine`` by hand. Must never: reach below it.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import jax

import hkv_jax
from hkv_jax.config import EngineConfig
from hkv_jax.engine.factory import build_engine
from hkv_jax.engine.request import Request
from hkv_jax.sampling_params import SamplingParams
from tools.step_bench import worker_loop


class HkvPeer:
    """An engine. Every sequence is a request of its own, computed by itself."""

    def __init__(self, model: Path, _threads: int, options: dict[str, Any]) -> None:
        """Loads and compiles; ``options`` are fields of ``EngineConfig``. Threads: as many as the process has cores."""
        config = EngineConfig.from_options({"model": model, **options})
        self.versions = {"hkv-jax": hkv_jax.__version__, "jax": jax.__version__, "jaxlib": version("jaxlib")}
        self._engine = build_engine(config, _tell).engine
        self._ids = count()
        self._first = ""
        self._living: list[str] = []
        self._tokens: list[int] = []
        self._num_read = 0

    def start(self, prompts: list[list[int]]) -> None:
        """Adds a request a prompt, and steps until each has had its first token read."""
        self._living = [self._add(prompt, max_tokens=None) for prompt in prompts]
        self._first, self._tokens, self._num_read = self._living[0], [], 0
        begun: set[str] = set()
        while len(begun) < len(self._living):
            begun |= set(self._step())

    def step(self) -> int:
        """Dispatches a step, reads the one before."""
        requests = self._step()
        if sorted(requests) != sorted(self._living):
            raise RuntimeError(f"a decode step of {len(self._living)} sequences gave {len(requests)} tokens")
        self._num_read += 1
        return self._tokens[self._num_read - 1]

    def stop(self) -> None:
        """Aborts everything; the engine is idle afterwards."""
        for request_id in self._living:
            self._engine.abort(request_id)
        while self._engine.has_work:
            self._engine.step()
        if self._engine.scheduler.num_preemptions:
            raise RuntimeError("sequences were preempted; give the cache more memory")

    def prefill(self, prompt: list[int]) -> int:
        """Runs a request that ends with its first token."""
        self._first, self._tokens = self._add(prompt, max_tokens=1), []
        while not self._tokens:
            self._step()
        return self._tokens[0]

    def _add(self, prompt: list[int], max_tokens: int | None) -> str:
        request_id = str(next(self._ids))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False, seed=0)
        self._engine.add(Request.create(request_id, prompt, params))
        return request_id

    def _step(self) -> list[str]:
        """One step; the requests that got a token. Tokens of the first request are kept."""
        events = self._engine.step()
        requests = [event.sequence.request.request_id for event in events]
        self._tokens += [e.token_id for e, request in zip(events, requests, strict=True) if request == self._first]
        return requests


def _tell(what: str, done: int, total: int) -> None:
    print(f"{what} ({done} of {total})", file=sys.stderr, flush=True)


if __name__ == "__main__":
    worker_loop.run(HkvPeer)
