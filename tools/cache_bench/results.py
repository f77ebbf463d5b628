"""Runs in worker processes, each once, with progress.

Owns: the results so far. Must never: know what they are for.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tools.cache_bench.cases import Case, Result, Run, measure


class RunFailedError(Exception):
    """A run came to no end; the message says which, and why."""


class Results:
    """What runs measured; one that is asked for again is not made again.

    With a file, results of earlier times are taken from it, and every new one is added at once.
    """

    def __init__(
        self,
        jobs: int,
        tell: Callable[[str], None],
        file: Path | None = None,
        measure_one: Callable[[Run], Result | None] = measure,
    ) -> None:
        """``jobs`` processes; each finished run is told."""
        self._jobs, self._tell, self._file, self._measure = jobs, tell, file, measure_one
        self._known: dict[Run, Result | None] = {}
        if file is not None and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                run, result = _read(line)
                self._known[run] = result

    def __getitem__(self, run: Run) -> Result:
        """The result of a run that was made, and could be."""
        result = self._known[run]
        assert result is not None, f"{run}: too little memory"
        return result

    def get(self, run: Run) -> Result | None:
        """The result of a run that was made; ``None`` where memory does not hold the longest request."""
        return self._known[run]

    def make(self, runs: Iterable[Run]) -> None:
        """Makes those of ``runs`` that were not made yet.

        Raises:
            RunFailedError: one failed; those that had ended are kept.
        """
        missing = [run for run in dict.fromkeys(runs) if run not in self._known]
        began = time.monotonic()
        # A fork would copy the locks of whatever threads the caller runs.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(max_workers=self._jobs, mp_context=context) as workers:
            futures = {workers.submit(self._measure, run): run for run in missing}
            for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
                run = futures[future]
                try:
                    self._keep(run, future.result())
                except Exception as error:
                    workers.shutdown(wait=False, cancel_futures=True)
                    raise RunFailedError(f"{run}: {type(error).__name__}: {error}") from error
                self._tell(f"{number} of {len(missing)} ({time.monotonic() - began:.0f} s): {run}")

    def _keep(self, run: Run, result: Result | None) -> None:
        self._known[run] = result
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": dataclasses.asdict(run), "result": result}) + "\n")


def _read(line: str) -> tuple[Run, Result | None]:
    entry = json.loads(line)
    fields = entry["run"]
    return Run(**{**fields, "case": Case(**fields["case"])}), entry["result"]
