"""From a case to its cost: compile in a process of its own, read the dump, lay the model over it.

Owns: the child process and its folder. Must never: keep a dump.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.tpu_costs.cases import Case
from tools.tpu_costs.kernels import KERNELS
from tools.tpu_costs.measured import Compiled, Cost
from tools.tpu_costs.schedule import read_kernel

ROOT = Path(__file__).resolve().parents[2]
COMPILE_LIMIT_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class DoesNotCompile:
    """A case that the compiler, or the kernel itself, refuses."""

    case: Case
    reason: str


Measured = Cost | DoesNotCompile


def compile_environment(dump: Path | None = None) -> dict[str, str]:
    """The environment in which libtpu compiles without a TPU, next to other processes, dumping to a folder."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # A cached program is not compiled, and so not dumped.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    if dump is not None:
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    return environment


def measure(case: Case) -> Measured:
    """Compiles a case, once for its schedule and once to time it without the writing of dumps, and models its cost.

    Raises:
        RuntimeError: the compiling process died.
    """
    (cost,) = measure_loads([case])
    if isinstance(cost, DoesNotCompile):
        return cost
    seconds = _compile(case, None)["compile_seconds"]
    return dataclasses.replace(cost, compiled=dataclasses.replace(cost.compiled, compile_seconds=seconds))


def measure_loads(loads: Sequence[Case]) -> list[Measured]:
    """Costs of one kernel under several loads (contexts, batches) from one compilation, that of the first load.

    Its seconds include the writing of the dump.
    """
    case = loads[0]
    with tempfile.TemporaryDirectory(prefix="tpu-cost-") as folder:
        try:
            result = _compile(case, Path(folder))
        except subprocess.TimeoutExpired:
            return [DoesNotCompile(load, f"took more than {COMPILE_LIMIT_SECONDS} s to compile") for load in loads]
        if "error" in result:
            return [DoesNotCompile(load, result["error"]) for load in loads]
        kernel = KERNELS[case.kernel]
        schedule = read_kernel(Path(folder), kernel.program)
        compiled = Compiled(result["compile_seconds"], result["alias_bytes"], result["temp_bytes"])
        return [Cost(load, schedule, compiled, kernel.work(load, schedule)) for load in loads]


def _compile(case: Case, dump: Path | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.tpu_costs.compile_case", case.to_json()]
    environment = compile_environment(dump)
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMPILE_LIMIT_SECONDS,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"{case.kernel} on {case.topology}: the compiler died\n{run.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer
