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


@pytest.mark.parametrize("name", ["decode", "decode, 48 layers", "decode, 2 chips", "prefill", "prefill, 4 GiB"])
def test_the_whole_state_is_updated_in_place(steps: dict[str, dict[str, Any]], name: str) -> None:
    step = steps[name]
    # Small arrays are padded to tiles.
    assert step["state_bytes"] <= step["alias_bytes"] <= step["state_bytes"] + MIB


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_temporary_memory_is_bounded_and_does_not_grow_with_the_arena(
    steps: dict[str, dict[str, Any]], name: str
) -> None:
    small, large = steps[name], steps[f"{name}, 4 GiB"]
    assert large["arena_bytes"] > 3.9 * small["arena_bytes"]
    assert large["temp_bytes"] == small["temp_bytes"] < 32 * MIB


def test_heads_that_are_replicated_cost_no_copy_either(steps: dict[str, dict[str, Any]]) -> None:
    assert steps["decode, 2 chips"]["temp_bytes"] < 32 * MIB


def test_four_times_the_layers_are_the_same_program(steps: dict[str, dict[str, Any]]) -> None:
    shallow, deep = steps["decode"], steps["decode, 48 layers"]
    for size in ("instructions", "code_bytes"):
        assert abs(deep[size] / shallow[size] - 1) < 0.1
    assert deep["temp_bytes"] < shallow["temp_bytes"] + MIB
