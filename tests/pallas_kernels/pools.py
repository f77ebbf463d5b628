"""A pool in which every slot that nobody filled is NaN, of any K/V dtype.

Owns: filling slots, and new tokens as kernels take them. Must never: know rows or kernels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pages import LANES, PageGeometry
from pallas_kernels.reference_pages import token_rows
from pallas_kernels.scales import Arena, ScaledArena, is_scaled, quantise

NAN_WORD = 0x7FC07FC0
"""NaN as a float32 and as two bfloat16."""

GARBAGE = 113
"""Integers are never NaN, but their scales are."""

Tokens = tuple[jax.Array, jax.Array, jax.Array | None]
"""Keys [T, K, Dk], values [T, K, Dv], and of int8 the words of their scales."""


def as_tokens(keys: np.ndarray, values: np.ndarray, pages: PageGeometry, dtype: str) -> Tokens:
    """Floats in the dtype of a pool."""
    if is_scaled(jnp.dtype(dtype)):
        return tuple(quantise(jnp.asarray(keys), jnp.asarray(values), pages))  # type: ignore[return-value]
    return jnp.asarray(keys).astype(dtype), jnp.asarray(values).astype(dtype), None


def drawn_tokens(rng: np.random.Generator, count: int, pages: PageGeometry, dtype: str) -> Tokens:
    """Normal numbers in the dtype of a pool, of another size for each token and head, as scales of integers will be."""
    shapes = ((count, pages.num_kv_heads, dim) for dim in (pages.key_dim, pages.value_dim))
    keys, values = (
        (rng.standard_normal(shape) * np.exp(rng.uniform(-0.7, 0.3, (*shape[:2], 1)))).astype(np.float32)
        for shape in shapes
    )
    return as_tokens(keys, values, pages, dtype)


class NanPool:
    """The pool of one group."""

    def __init__(self, pages: PageGeometry, dtype: str, num_pages: int) -> None:
        self._pages, self._scaled = pages, is_scaled(jnp.dtype(dtype))
        shape = (num_pages, pages.num_planes, pages.block_size)
        filler = GARBAGE if self._scaled else np.nan
        self._slots = [np.full((*shape, LANES), filler, jnp.dtype(dtype))]
        if self._scaled:
            self._slots.append(np.full(shape, NAN_WORD, np.int32))

    def put(self, page: int, offset: int, tokens: Tokens, index: int) -> None:
        """Puts one of the tokens in a slot."""
        for slots, new in zip(self._slots, token_rows(*tokens, self._pages), strict=True):
            slots[page, :, offset] = np.asarray(new[index])

    def arena(self) -> Arena:
        """As a kernel takes it."""
        rows, *words = (jnp.asarray(slots).reshape(1, -1, LANES) for slots in self._slots)
        return ScaledArena(rows, *words) if words else rows
