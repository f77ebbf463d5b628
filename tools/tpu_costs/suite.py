"""What must compile: each kernel at the shapes of real models, at the largest load it is meant for.

Owns: the list, and compiling it in a few processes. Must never: judge; tests and the table do.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tools.tpu_costs.cases import CHUNK, LANES, SHAPES, Case, default_block_size
from tools.tpu_costs.measure import ROOT, compile_environment

MOST_SEQUENCES = 256
LONGEST_CONTEXT = 128 * 1024
LARGE_BLOCK = 1024
"""Four pages of it lie in vector memory while it is written: more than the compiler grants a kernel unasked."""

GLOBAL_LAYERS = {
    "gemma-3-27b-tp8": 128,
    "gemma-3-1b": 128,
    "gpt-oss-20b": 128,
    "gpt-oss-120b-tp8": 128,
    "gemma-4-31b-global": 64,
    "llama-3.1-8b": 64,
}
"""Shapes that have global layers, with the tokens of their blocks."""

INTEGERS = (
    "windowed, gemma-4-31b-local",
    "windowed, gpt-oss-20b",
    "windowed-prefill, gemma-4-31b-local",
    "kv-update, gemma-4-31b-local",
    "paged, llama-3.1-8b",
    "paged-prefill, gpt-oss-20b",
)
"""Cases that are compiled for int8 K/V too: the most planes, heads that share one, many query heads."""


def cases(topology: str) -> dict[str, Case]:
    """All cases of one topology by name; those of int8 K/V end in ``int8``."""
    wide = dict(_cases(topology))
    return wide | {f"{name}, int8": _of_integers(wide[name]) for name in INTEGERS}


def few_cases(topology: str) -> dict[str, Case]:
    """One of each kernel, those of the shape that stresses it; of int8 K/V a decode and a prefill."""
    chosen = (
        "windowed, gemma-4-31b-local",
        "windowed, gpt-oss-20b",
        "paged, llama-3.1-8b",
        "windowed-prefill, gemma-3-27b-tp8",
        "paged-prefill, gpt-oss-20b",
        "kv-update, gemma-3-1b",
        f"kv-update, llama-3.1-8b, blocks of {LARGE_BLOCK:,}",
        "windowed, gemma-4-31b-local, int8",
        "paged-prefill, gpt-oss-20b, int8",
    )
    everything = cases(topology)
    return {name: everything[name] for name in chosen}


def _cases(topology: str) -> Iterator[tuple[str, Case]]:
    for name, geometry in SHAPES.items():
        if geometry.window is None:
            continue
        block = default_block_size(geometry)
        decode = Case("windowed", geometry, topology, block, LONGEST_CONTEXT, MOST_SEQUENCES)
        yield f"windowed, {name}", decode
        prefill = dataclasses.replace(decode, kernel="windowed-prefill", batch=1, chunk=CHUNK)
        yield f"windowed-prefill, {name}", prefill
        yield f"kv-update, {name}", dataclasses.replace(prefill, kernel="kv-update")
    for name, block in GLOBAL_LAYERS.items():
        geometry = dataclasses.replace(SHAPES[name], window=None)
        decode = Case("paged", geometry, topology, block, LONGEST_CONTEXT, MOST_SEQUENCES)
        yield f"paged, {name}", decode
        yield f"paged-prefill, {name}", dataclasses.replace(decode, kernel="paged-prefill", batch=1, chunk=CHUNK)
    large = dataclasses.replace(SHAPES["llama-3.1-8b"], window=None)
    update = Case("kv-update", large, topology, LARGE_BLOCK, LONGEST_CONTEXT, batch=1, chunk=CHUNK)
    yield f"kv-update, llama-3.1-8b, blocks of {LARGE_BLOCK:,}", update


def _of_integers(case: Case) -> Case:
    """The same load on int8 K/V, in blocks that rows of bytes fill."""
    geometry = dataclasses.replace(case.geometry, dtype="int8")
    return dataclasses.replace(case, geometry=geometry, block_size=max(case.block_size, default_block_size(geometry)))


def compile_all(named: dict[str, Case], processes: int = 2) -> dict[str, dict[str, Any]]:
    """Compiles cases, some at a time; results by name, an ``error`` in those that the compiler refused.

    Raises:
        RuntimeError: a compiling process died.
    """
    names = list(named)
    shares = [names[i::processes] for i in range(processes)]
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        results = pool.map(lambda share: _compile_share([named[name] for name in share]), shares)
        found = {
            name: result
            for share, of in zip(shares, results, strict=True)
            for name, result in zip(share, of, strict=True)
        }
    return {name: found[name] for name in names}


def _compile_share(share: Sequence[Case]) -> list[dict[str, Any]]:
    if not share:
        return []
    command = [sys.executable, "-m", "tools.tpu_costs.compile_case", *(case.to_json() for case in share)]
    run = subprocess.run(command, cwd=ROOT, env=compile_environment(), capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    if run.returncode or len(lines) != len(share):
        raise RuntimeError(f"the compiler died after {len(lines)} of {len(share)} cases\n{run.stderr[-3000:]}")
    return [json.loads(line) for line in lines]


def pool_bytes(case: Case) -> int:
    """Bytes of the pool that a case is given, scales included where it has some: a word for each row."""
    from tools.tpu_costs.our_kernels import pool_rows

    row_bytes = LANES * case.geometry.itemsize + (4 if case.geometry.dtype == "int8" else 0)
    return pool_rows(case) * row_bytes
