"""What importing the package loads, seen from a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    *("jax", "jaxlib", "flax", "optax", "orbax", "grpc", "google"),
    *("tokenizers", "jinja2", "rich", "torch", "matplotlib"),
)


def heavy_modules_after(statement: str) -> list[str]:
    """Which of the heavy packages are loaded once `statement` has run in a new process."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return sorted(set(json.loads(shown.stdout)) & set(HEAVY))


@pytest.mark.parametrize("module", ["hkv_jax", "pallas_kernels", "serving"])
def test_importing_a_package_loads_nothing_heavy(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == []


def test_the_public_names_of_the_core_are_light() -> None:
    assert heavy_modules_after("from hkv_jax import SamplingParams, RequestOutput, __version__") == []


@pytest.mark.parametrize(
    "module", ["hkv_jax.kvcache.manager", "hkv_jax.engine.scheduler", "hkv_jax.testing.fake_runner", "hkv_jax.config"]
)
def test_host_code_runs_without_jax_flax_or_grpc(module: str) -> None:
    """The import contracts read the source; this catches imports made by a name in a string."""
    assert not {"jax", "jaxlib", "flax", "grpc"} & set(heavy_modules_after(f"import {module}"))
