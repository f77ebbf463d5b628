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
        order: i32[S], the rows in the order they are computed in: those that do something first.
    """

    tables: jax.Array
    kv_lens: jax.Array
    slots: jax.Array
    order: jax.Array


class QueryRows(NamedTuple):
    """Decode rows as the engine knows them, all [S].

    Attributes:
        lanes: i32, whose table is the row's.
        positions: i32 of the query.
        context_starts: i32, a multiple of the block size; windowed layers have nothing below it.
        slots: i32, where K/V goes, or NO_SLOT.
        live: bool; other rows do nothing.
    """

    lanes: jax.Array
    positions: jax.Array
    context_starts: jax.Array
    slots: jax.Array
    live: jax.Array


def windowed_rows(shape: AttentionShape, tables: jax.Array, rows: QueryRows) -> DecodeRows:
    """Decode rows of a windowed group; tables i32[Z, R] have block n of a lane in column n % R.

    The ring of a lane may still name an older block where the row begins a new one (it is updated after the step), so
    the block a row writes is taken from its slot.
    """
    block = shape.pages.block_size
    assert shape.window is not None
    width = shape.table_width
    first = jnp.maximum(rows.positions - (shape.window - 1), rows.context_starts) // block
    columns = first[:, None] + jnp.arange(width, dtype=jnp.int32)
    compact = jnp.take_along_axis(tables.at[rows.lanes].get(mode="clip"), columns % tables.shape[1], axis=1)
    newest = rows.positions // block - first
    is_newest = jnp.arange(width, dtype=jnp.int32) == newest[:, None]
    # Without a slot the newest block may be one the lane does not hold: its own oldest is read instead, and masked.
    begins = rows.positions % block == 0
    unwritten = jnp.where(begins, compact[:, 0], jnp.take_along_axis(compact, newest[:, None], axis=1)[:, 0])
    own = jnp.where(rows.slots == NO_SLOT, unwritten, rows.slots // block)
    compact = jnp.where(is_newest, own[:, None], compact)
    return _decode_rows(compact, rows.positions + 1 - first * block, rows)


def global_rows(tables: jax.Array, rows: QueryRows) -> DecodeRows:
    """Decode rows of a global group; tables i32[Z, M] have block n of a lane in column n."""
    return _decode_rows(in_vectors(tables.at[rows.lanes].get(mode="clip")), rows.positions + 1, rows)


def in_vectors(tables: jax.Array) -> jax.Array:
    """Tables [S, M] as [S, ceil(M / 128), 128], which a kernel can copy row by row."""
    width = -(-tables.shape[1] // LANES) * LANES
    return jnp.pad(tables, ((0, 0), (0, width - tables.shape[1]))).reshape(-1, width // LANES, LANES)


def _decode_rows(tables: jax.Array, kv_lens: jax.Array, rows: QueryRows) -> DecodeRows:
    order = jnp.argsort(~rows.live, stable=True).astype(jnp.int32)
    return DecodeRows(tables, jnp.where(rows.live, kv_lens, 0), jnp.where(rows.live, rows.slots, NO_SLOT), order)
