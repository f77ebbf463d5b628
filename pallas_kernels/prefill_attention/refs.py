"""What the prefill kernel is given and what it keeps: references by memory space, and the work they describe.

Owns: the names and shapes. Must never: compute.

Axis letters: as in ``tile``; V visits, C planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Scalars(NamedTuple):
    """SMEM: visits i32[V · fields], num_visits i32[1], layer i32[1], tables i32[S · M] (windowed, else i32[1])."""

    visits: Any
    num_visits: Any
    layer: Any
    tables: Any


class Arrays(NamedTuple):
    """In HBM, but for sinks f32[H] (SMEM) or None.

    queries [T, H · lanes]; own: the step's keys and values [T, K · lanes] each, or one array of both where they share a
    plane, or none; pages [pages, C, P, 128]; tables i32[S, M / 128, 128] of global layers, else None; outputs
    [T, H · lanes]. Scales of integers are ``stretch_scales.ScaleRefs``.
    """

    queries: Any
    own: Sequence[Any]
    pages: Any
    tables: Any
    sinks: Any
    outputs: Any


class Scratch(NamedTuple):
    """VMEM, but for the table, and semaphores.

    queries [2, queries, lanes], kv [2, planes, held, 128], outputs [2, queries, lanes]; then of one unit rows
    [heads, R, key lanes], scores [heads, held / 128, R, 128], lane maxima, maxima and sums [heads, R, 128], weighted
    sums [heads, R, value lanes], bias of a tile's scores f32[queries, N]; table i32[2, M / 128, 128] (SMEM);
    semaphores of the four kinds of copies, two each.
    """

    queries: Any
    kv: Any
    outputs: Any
    rows: Any
    scores: Any
    lane_maxima: Any
    maxima: Any
    sums: Any
    weighted: Any
    bias: Any
    table: Any
    fetched_queries: Any
    fetched_kv: Any
    stored: Any
    fetched_table: Any


class Visit(NamedTuple):
    """A query tile and one of its rows.

    row; token: first of the tile; begin, end: the row's tokens; start: position of ``begin``; context: sliding layers
    see nothing below; first_query, last_query: positions of the first and last query that is both in tile and row.
    """

    row: Any
    token: Any
    begin: Any
    end: Any
    start: Any
    context: Any
    first_query: Any
    last_query: Any


class Stretch(NamedTuple):
    """Keys held at once: blocks of the pool, then copies of the step's own keys.

    ``num_blocks`` blocks, the first at column ``column`` of the row's table and at position ``position``, are live
    below ``pool_end``; ``num_own`` copies begin at token ``own_token``.
    """

    column: Any
    num_blocks: Any
    position: Any
    pool_end: Any
    own_token: Any
    num_own: Any
