"""What every test starts from: a CPU with four virtual devices, a shared compilation cache, repeatable examples.

Owns the process environment of the test run and must set it before anything imports jax. Must never import jax
itself: most tests need no jax, and some check that it stays away.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent


XLA_FLAGS = {
    "xla_force_host_platform_device_count": 4,
    # Tests compile far more than they run. LLVM's optimisations would cost a third of the suite and buy nothing, and
    # fusions by way of MLIR half of what is left (a tiny engine: 18.7 s of processor time, 7.7 without).
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": "false",
}


def _prepare_jax() -> None:
    """Point jax at virtual CPU devices; child processes inherit it.

    The compilation cache lets tests (and servers that tests start) share equal programs, within a run and across runs.
    Workers that run tests side by side have one each: jax does not write an entry at one stroke.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    flags = os.environ.get("XLA_FLAGS", "")
    for flag, value in XLA_FLAGS.items():
        if flag not in flags:
            flags += f" --{flag}={value}"
    os.environ["XLA_FLAGS"] = flags.strip()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax-tests" / worker))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


_prepare_jax()

# The same examples every time, on any machine; `explore` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile(
    "explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
