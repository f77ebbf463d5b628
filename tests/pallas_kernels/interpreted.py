"""Kernels on a CPU: interpreted with race detection, uninitialised memory NaN.

Owns: the mode, and what must hold after every call. Must never: know a kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def races_found() -> bool:
    """Whether the last interpreted call had a race; jax has no public name for it, and moved it."""
    for name in ("interpret.interpret_pallas_call", "interpret"):
        try:
            module = importlib.import_module(f"jax._src.pallas.mosaic.{name}")
        except ImportError:
            continue
        if hasattr(module, "races"):
            return bool(module.races is not None and module.races.races_found)
    raise AssertionError("this jax keeps the races it found somewhere else")


def settled_call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` gives, compiled; fails where a kernel raced or left copies that it did not wait for.

    The interpreter only prints the latter; a TPU may stop, or the next call believe that its copies have arrived.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = jax.block_until_ready(jax.jit(function)(*arguments))
    assert "non-zero count" not in said.getvalue(), said.getvalue()
    assert not races_found()
    return result


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Every bit of two arrays, NaN and all."""
    for array in (actual, expected):
        assert isinstance(array, jax.Array)
    one, other = (np.asarray(array).view(np.uint8) for array in (actual, expected))
    assert (one == other).all(), f"{int((one != other).sum())} of {one.size} bytes differ"
