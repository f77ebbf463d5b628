"""The step compiled ahead of time for a TPU v6e: no copy of the arena, and a program that does not grow with depth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tpu_compile.needs_libtpu import NEEDS_LIBTPU

MIB = 1 << 20

pytestmark = NEEDS_LIBTPU

BACKENDS = ["", "kernels, "]
"""How the names of a backend's steps begin: XLA's, those of the Pallas kernels."""


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    """Measurements of compiled steps by name."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Do not ask a cloud for the topology, nor mind another process that compiles.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    script = Path(__file__).with_name("compile_steps.py")
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-4000:]
    measured: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    for name, step in measured.items():
        print(f"v6e {name}: compiled in {step['seconds']} s")  # noqa: T201
    return measured


@pytest.mark.parametrize("prefix", BACKENDS)
@pytest.mark.parametrize("name", ["decode", "decode, 48 layers", "decode, 2 chips", "prefill", "prefill, 4 GiB"])
def test_the_whole_state_is_updated_in_place(steps: dict[str, dict[str, Any]], name: str, prefix: str) -> None:
    step = steps[prefix + name]
    # Small arrays are padded to tiles.
    assert step["state_bytes"] <= step["alias_bytes"] <= step["state_bytes"] + MIB


@pytest.mark.parametrize("name", ["decode", "prefill", "kernels, decode"])
def test_temporary_memory_is_bounded_and_does_not_grow_with_the_arena(
    steps: dict[str, dict[str, Any]], name: str
) -> None:
    small, large = steps[name], steps[f"{name}, 4 GiB"]
    assert large["arena_bytes"] > 3.9 * small["arena_bytes"]
    assert large["temp_bytes"] == small["temp_bytes"] < 32 * MIB


def test_the_kernels_prefill_takes_no_more_of_a_larger_arena(steps: dict[str, dict[str, Any]]) -> None:
    # Equal it is not: the compiler keeps a few more small arrays in vector memory where the arena is small (98 kB).
    small, large = steps["kernels, prefill"], steps["kernels, prefill, 4 GiB"]
    assert large["temp_bytes"] <= small["temp_bytes"] < 32 * MIB


@pytest.mark.parametrize("prefix", BACKENDS)
def test_heads_that_are_replicated_cost_no_copy_either(steps: dict[str, dict[str, Any]], prefix: str) -> None:
    assert steps[f"{prefix}decode, 2 chips"]["temp_bytes"] < 32 * MIB


@pytest.mark.parametrize("prefix", BACKENDS)
def test_four_times_the_layers_are_the_same_program(steps: dict[str, dict[str, Any]], prefix: str) -> None:
    shallow, deep = steps[f"{prefix}decode"], steps[f"{prefix}decode, 48 layers"]
    for size in ("instructions", "code_bytes"):
        assert abs(deep[size] / shallow[size] - 1) < 0.1
    assert deep["temp_bytes"] < shallow["temp_bytes"] + MIB
