"""The vector memory that a decode or a write lays out for itself, and how much it asks of the compiler.

Owns: ``VectorBuffer`` and the limit. Must never: choose sizes (``tiles`` does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

BESIDE_BYTES = 16 * 2**20
"""Bytes of vector memory for everything else: queries, outputs, what the compiler pads and spills."""


class VectorBuffer(NamedTuple):
    """An array in vector memory that lives as long as the kernel."""

    shape: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def num_bytes(self) -> int:
        """Its size, without what the compiler pads."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def allocations(buffers: Sequence[VectorBuffer]) -> list[Any]:
    """The buffers as scratch shapes of ``pallas_call``."""
    return [pltpu.VMEM(buffer.shape, buffer.dtype) for buffer in buffers]


def limit(buffers: Sequence[VectorBuffer]) -> int:
    """Bytes that a kernel with these buffers asks of the compiler."""
    return sum(buffer.num_bytes for buffer in buffers) + BESIDE_BYTES
