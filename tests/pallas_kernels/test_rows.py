"""Compact tables and lengths of decode rows, against the sequence's blocks written out."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pages import NO_SLOT, AttentionShape, PageGeometry
from pallas_kernels.rows import QueryRows, global_rows, windowed_rows

BLOCK, WINDOW = 16, 48
SHAPE = AttentionShape(PageGeometry(BLOCK, 1, 128, 128), 1, WINDOW, 1.0)


def rows_at(position: int, slot: int, context_start: int = 0, live: bool = True) -> QueryRows:
    """One row, of lane 1."""
    lane, at, start, where = (jnp.array([value], jnp.int32) for value in (1, position, context_start, slot))
    return QueryRows(lane, at, start, where, jnp.array([live]))


def ring_before(position: int, width: int) -> np.ndarray:
    """Lane 1's ring before the step that computes ``position``: block n has page 100 + n."""
    ring = np.zeros((2, width), np.int32)
    for number in range(max(position - 1, 0) // BLOCK + 1):
        ring[1, number % width] = 100 + number
    return ring


@pytest.mark.parametrize("position", [0, 1, 15, 16, 47, 48, 49, 63, 64, 200])
@pytest.mark.parametrize("width", [SHAPE.table_width, SHAPE.table_width + 2])
def test_the_window_ends_in_the_block_of_the_slot(position: int, width: int) -> None:
    new_page = 900
    rows = windowed_rows(SHAPE, jnp.asarray(ring_before(position, width)), rows_at(position, new_page * BLOCK + 3))
    first = max(position - WINDOW + 1, 0) // BLOCK
    newest = position // BLOCK - first
    assert int(rows.kv_lens[0]) == position + 1 - first * BLOCK
    assert rows.tables[0, : newest + 1].tolist() == [100 + first + i for i in range(newest)] + [new_page]
    assert int(rows.slots[0]) == new_page * BLOCK + 3


def test_without_a_slot_a_row_never_names_a_block_that_is_not_its_own() -> None:
    position = 4 * BLOCK
    ring = ring_before(position, SHAPE.table_width)
    rows = windowed_rows(SHAPE, jnp.asarray(ring), rows_at(position, NO_SLOT))
    first = (position - WINDOW + 1) // BLOCK
    assert rows.tables[0].tolist() == [100 + first, 101 + first, 102 + first, 100 + first]
    inside = windowed_rows(SHAPE, jnp.asarray(ring_before(position + 5, 4)), rows_at(position + 5, NO_SLOT))
    assert inside.tables[0, int(inside.kv_lens[0] - 1) // BLOCK] == 100 + (position + 5) // BLOCK


def test_nothing_below_the_context_start_is_in_the_table() -> None:
    position, start = 100, 80
    rows = windowed_rows(SHAPE, jnp.asarray(ring_before(position, 4)), rows_at(position, 7, context_start=start))
    assert int(rows.kv_lens[0]) == position + 1 - start
    assert int(rows.tables[0, 0]) == 100 + start // BLOCK


def test_rows_that_do_nothing() -> None:
    rows = windowed_rows(SHAPE, jnp.asarray(ring_before(40, 4)), rows_at(40, 7, live=False))
    assert int(rows.kv_lens[0]) == 0
    assert int(rows.slots[0]) == NO_SLOT


def test_global_rows_are_whole_vectors_and_live_rows_come_first() -> None:
    tables = jnp.arange(3 * 130, dtype=jnp.int32).reshape(3, 130)
    lanes, positions = jnp.array([2, 0, 1], jnp.int32), jnp.array([5, 0, 7], jnp.int32)
    zeros, live = jnp.zeros(3, jnp.int32), jnp.array([True, False, True])
    rows = global_rows(tables, QueryRows(lanes, positions, zeros, positions, live))
    assert rows.tables.shape == (3, 2, 128)
    assert rows.tables[0].reshape(-1)[:130].tolist() == tables[2].tolist()
    assert rows.kv_lens.tolist() == [6, 0, 8]
    assert rows.order.tolist() == [0, 2, 1]
