"""Which keys of a tile its queries attend to.

Owns: where the keys lie against the causal edge, the window and what is written. Must never: read keys or values.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.prefill_attention.refs import Stretch, Visit
from pallas_kernels.prefill_attention.tile import PrefillTile

NOT_A_KEY = 2**30
"""The position of what is no key: after every query."""


class Edges:
    """Where the keys of one tile lie, or of several side by side, and which of them queries see."""

    def __init__(self, tile: PrefillTile, visit: Visit, stretch: Stretch, span: tuple[Any, int]) -> None:
        self._tile, self._visit, self._stretch = tile, visit, stretch
        self.first, size = span
        first = self.first
        self._pool_keys = stretch.num_blocks * tile.block
        end = first + size
        self._end = self._pool_keys + stretch.num_own * tile.own_tokens
        in_pool, in_own = end <= self._pool_keys, (first >= self._pool_keys) & (end <= self._end)
        # Positions of own keys from the token they lie at.
        self._own_shift = visit.start - visit.begin + stretch.own_token - self._pool_keys
        lowest = first + jnp.where(in_pool, stretch.position, self._own_shift)
        highest = lowest + size - 1
        # Nobody need have written what lies in the oldest block before the first key.
        self._first_key = 0 if tile.shape.window is None else first_seen_key(tile, visit)
        first_key = jnp.where(in_pool, self._first_key, visit.start)
        last_key = jnp.where(in_pool, stretch.pool_end, visit.start + visit.end - visit.begin) - 1
        self.has_others = jnp.logical_not((in_pool | in_own) & (lowest >= first_key) & (highest <= last_key))
        plain = jnp.logical_not(self.has_others) & (highest <= visit.first_query)
        window = tile.shape.window
        self.is_plain = plain if window is None else plain & (lowest > visit.last_query - window)

    def positions(self, axis: int) -> jax.Array:
        """Positions of the tile's keys along ``axis``, i32[N, 1] or [1, N]; ``NOT_A_KEY`` for what is none."""
        tile, visit, stretch = self._tile, self._visit, self._stretch
        shape = (tile.keys, 1) if axis == 0 else (1, tile.keys)
        index = self.first + lax.broadcasted_iota(jnp.int32, shape, axis)
        pool = index + stretch.position
        pool = jnp.where((pool >= self._first_key) & (pool < stretch.pool_end), pool, NOT_A_KEY)
        own = index + self._own_shift
        is_own = (index < self._end) & (own >= visit.start) & (own < visit.start + visit.end - visit.begin)
        return jnp.where(index < self._pool_keys, pool, jnp.where(is_own, own, NOT_A_KEY))

    def seen(self) -> jax.Array:
        """bool[queries, N]: which keys each query of the tile sees."""
        visit, window = self._visit, self._tile.shape.window
        keys = self.positions(1)
        first = visit.start + visit.token - visit.begin
        queries = first + lax.broadcasted_iota(jnp.int32, (self._tile.queries, 1), 0)
        seen = keys <= queries
        return seen if window is None else seen & (keys > queries - window)


def first_seen_key(tile: PrefillTile, visit: Visit) -> Any:
    """The lowest position that any query of a windowed visit sees."""
    assert tile.shape.window is not None
    return jnp.maximum(visit.first_query - (tile.shape.window - 1), visit.context)
