"""Rows of more than one query as the prefill kernels want them: made once a step for each group, shared by its layers.

The tokens of a step lie side by side, whatever row they belong to, and are cut into query tiles. A *visit* is a tile
and one of the rows in it: a kernel runs one visit after the other.

Owns: the list of visits, and the tables of rows. Must never: look into the pool.

Axis letters: S rows, Z lanes, T tokens, M columns of a group's table, V visits, P token slots of a block, W window.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.pages import AttentionShape
from pallas_kernels.rows import in_vectors

VISIT_FIELDS = 6
"""row · tile · first token of the row · end of its tokens · position of its first token · context start."""


class StepTokens(NamedTuple):
    """Which rows the tokens of a step belong to, all i32.

    Attributes:
        lanes: [S].
        start_positions: [S], position of a row's first query.
        context_starts: [S], a windowed layer sees nothing below; a multiple of the block size.
        query_starts: [S + 1], first token of each row.
        first_row: [], rows before this one are not prefilled (they decode).
        end_row: [], nor those from this one on.
    """

    lanes: jax.Array
    start_positions: jax.Array
    context_starts: jax.Array
    query_starts: jax.Array
    first_row: jax.Array
    end_row: jax.Array


class PrefillRows(NamedTuple):
    """What the layers of a group share in a step.

    Attributes:
        visits: i32[V · VISIT_FIELDS], of which the first ``num_visits`` count.
        num_visits: i32[1].
        tables: pages of layer 0. Windowed: i32[S, M], column j the block that is j after the oldest which the row's
            first query sees; only those of tokens before the row are looked at. Global: i32[S, M / 128, 128], M padded
            to whole vectors, column j block j.
    """

    visits: jax.Array
    num_visits: jax.Array
    tables: jax.Array


def prefill_rows(
    shape: AttentionShape, tables: jax.Array, tokens: StepTokens, num_tokens: int, query_tile: int
) -> PrefillRows:
    """Rows of a step whose ``num_tokens`` tokens are cut into tiles of ``query_tile``.

    Args:
        shape: the group's attention.
        tables: i32[Z, M]: windowed, block n of a lane in column n % M; global, in column n.
        tokens: which rows there are.
        num_tokens: T, a multiple of ``query_tile``.
        query_tile: as the kernel will use it.
    """
    visits, num_visits = _visits(tokens, num_tokens, query_tile)
    of_rows = tables.at[tokens.lanes].get(mode="clip")
    width = tables.shape[1]
    if shape.window is None:
        return PrefillRows(visits, num_visits, in_vectors(of_rows))
    first = jnp.maximum(tokens.start_positions - (shape.window - 1), tokens.context_starts) // shape.pages.block_size
    columns = (first[:, None] + jnp.arange(width, dtype=jnp.int32)) % width
    return PrefillRows(visits, num_visits, jnp.take_along_axis(of_rows, columns, axis=1))


def _visits(tokens: StepTokens, num_tokens: int, query_tile: int) -> tuple[jax.Array, jax.Array]:
    starts, ends = tokens.query_starts[:-1], tokens.query_starts[1:]
    rows = jnp.arange(starts.shape[0], dtype=jnp.int32)
    runs = (rows >= tokens.first_row) & (rows < tokens.end_row) & (ends > starts)
    first_tiles = starts // query_tile
    num_tiles = jnp.where(runs, (ends - 1) // query_tile - first_tiles + 1, 0)
    visit_ends = jnp.cumsum(num_tiles)
    most = num_tokens // query_tile + rows.shape[0]
    visit = jnp.arange(most, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(visit_ends, visit, side="right"), rows.shape[0] - 1).astype(jnp.int32)
    tile = first_tiles[row] + visit - (visit_ends - num_tiles)[row]
    fields = [row, tile, starts[row], ends[row], tokens.start_positions[row], tokens.context_starts[row]]
    return jnp.stack(fields, axis=1).reshape(-1), visit_ends[-1:].astype(jnp.int32)
