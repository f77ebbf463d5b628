"""The parent's side of a measurement: one worker process a peer, kept loaded, asked one at a time.

Owns: their environment, their lives, what they say when they fail. Must never: import a peer's libraries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from tools.throwaway_env import say

ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 15
SECONDS_BETWEEN_REPORTS = 15.0


@dataclasses.dataclass(frozen=True)
class PeerSpec:
    """How a peer is run: the interpreter, the module, what it loads and its own options."""

    name: str
    python: Path
    module: str
    model: Path
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class WorkerFailedError(Exception):
    """A worker ended by itself; the message has the last lines it wrote."""


def environment(cores: Sequence[int], cache: Path) -> dict[str, str]:
    """What every worker finds around it, the same for all peers.

    Settings for particular machines or libraries are left out, so that each library chooses for itself. Compiled
    programs of jax go to ``cache``: they may be split for as many cores as the process had that compiled them.
    """
    foreign = ("OPENBLAS_", "OMP_", "MKL_", "GOMP_", "KMP_", "GGML_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {
        "PYTHONPATH": str(ROOT),
        # Huge pages for large allocations; several peers gain a lot, and none would ask for them alone.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "OMP_NUM_THREADS": str(len(cores)),
        "JAX_PLATFORMS": "cpu",
        "HKV_JAX_COMPILATION_CACHE": str(cache / f"xla-{len(cores)}"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Worker:
    """One peer in a process of its own; use it in a ``with``."""

    def __init__(self, spec: PeerSpec, cores: Sequence[int], folder: Path) -> None:
        """Starts it and waits until its model is loaded; what it writes goes to a log in ``folder``.

        Raises:
            WorkerFailedError: it could not load.
        """
        self.spec = spec
        self._log = folder / f"{spec.name.replace(' ', '-').replace('/', '-')}-{len(cores)}.log"
        command = [str(spec.python), "-m", spec.module, str(spec.model), "--cores", ",".join(map(str, cores))]
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*command, "--options", json.dumps(spec.options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(cores, folder),
            )
        try:
            self._report_until_loaded()
            self.versions: dict[str, str] = self._read()["versions"]
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """Has it do something, and waits for the answer.

        Raises:
            WorkerFailedError: it ended instead.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead; reading tells what it said last
        return self._read()

    def close(self) -> None:
        """Ends the process; twice does no harm."""
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _report_until_loaded(self) -> None:
        """Passes on what the worker said last, now and then."""
        stdout = self._process.stdout
        assert stdout is not None
        while not select.select([stdout], [], [], SECONDS_BETWEEN_REPORTS)[0]:
            for line in self._last_lines(1):
                say(f"  {self.spec.name}: {line}")

    def _last_lines(self, count: int) -> list[str]:
        return self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            heading = f"{self.spec.name} ended with status {status}; it said last:"
            raise WorkerFailedError("\n".join([heading, *self._last_lines(LAST_LINES)]))
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def read_bandwidth(python: Path, cores: Sequence[int], folder: Path, num_bytes: int) -> Iterator[list[float]]:
    """GB/s the cores read, measured before and after what happens inside; the list has both at the end.

    Raises:
        WorkerFailedError: it cannot be measured.
    """
    figures: list[float] = []
    command = [str(python), "-m", "tools.step_bench.bandwidth", ",".join(map(str, cores)), str(num_bytes)]

    def measure() -> None:
        done = subprocess.run(command, env=environment(cores, folder), capture_output=True, text=True, check=False)
        if done.returncode:
            raise WorkerFailedError(f"the bandwidth of memory could not be measured:\n{done.stderr}")
        figures.append(float(done.stdout))

    measure()
    yield figures
    measure()
