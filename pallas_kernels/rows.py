"""Rows of a step as the kernels want them: made once a step for each group, shared by its layers.

Owns: the way from the tables that lanes keep to compact tables of rows. Must never: look into the pool.

Axis letters: S rows, Z lanes, T tokens, M columns of a group's table, P token slots of a block, W window in tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.pages import LANES, NO_SLOT, AttentionShape


class DecodeRows(NamedTuple):
    """One query token a row; row r is token r.

    Attributes:
        tables: pages of layer 0. Windowed: i32[S, M], column j the block that is j after the oldest in the window.
            Global: i32[S, M / 128, 128], M padded to whole vectors, column j block j. Columns past the live ones hold
            any page of the pool.
        kv_lens: i32[S], keys the row sees through its table, its own included, counted from the first token of
            column 0; 0 for a row that does nothing and gives 0.
        slots: i32[S], where the row's own K/V goes, page · P + offset of layer 0, or NO_SLOT.
    """

    tables: jax.Array
    kv_lens: jax.Array
    slots: jax.Array


def windowed_rows(
    shape: AttentionShape, tables: jax.Array, lanes: jax.Array, positions: jax.Array, slots: jax.Array, live: jax.Array
) -> DecodeRows:
    """Decode rows of a windowed group.

    The ring of a lane may still name an older block where the row begins a new one (it is updated after the step), so
    the block a row writes is taken from its slot.

    Args:
        shape: the group's attention.
        tables: i32[Z, M], block n of a lane in column n % M.
        lanes: i32[S].
        positions: i32[S] of the query.
        slots: i32[S].
        live: bool[S]; other rows do nothing.
    """
    block = shape.pages.block_size
    assert shape.window is not None
    width = tables.shape[1]
    first = jnp.maximum(positions - (shape.window - 1), 0) // block
    columns = first[:, None] + jnp.arange(width, dtype=jnp.int32)
    compact = jnp.take_along_axis(tables.at[lanes].get(mode="clip"), columns % width, axis=1)
    newest = positions // block - first
    is_newest = jnp.arange(width, dtype=jnp.int32) == newest[:, None]
    # Without a slot the newest block may be one the lane does not hold: its own oldest is read instead, and masked.
    begins = positions % block == 0
    unwritten = jnp.where(begins, compact[:, 0], jnp.take_along_axis(compact, newest[:, None], axis=1)[:, 0])
    own = jnp.where(slots == NO_SLOT, unwritten, slots // block)
    compact = jnp.where(is_newest, own[:, None], compact)
    kv_lens = jnp.where(live, positions + 1 - first * block, 0)
    return DecodeRows(compact, kv_lens, jnp.where(live, slots, NO_SLOT))


def global_rows(
    tables: jax.Array, lanes: jax.Array, positions: jax.Array, slots: jax.Array, live: jax.Array
) -> DecodeRows:
    """Decode rows of a global group: arguments as of ``windowed_rows``, block n of a lane in column n."""
    of_rows = tables.at[lanes].get(mode="clip")
    width = -(-tables.shape[1] // LANES) * LANES
    padded = jnp.pad(of_rows, ((0, 0), (0, width - tables.shape[1])))
    kv_lens = jnp.where(live, positions + 1, 0)
    return DecodeRows(padded.reshape(-1, width // LANES, LANES), kv_lens, jnp.where(live, slots, NO_SLOT))
