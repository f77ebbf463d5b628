"""Visits of a step's rows: every token of a row that prefills in exactly one of them, nobody else's in any."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.prefill_rows import VISIT_FIELDS, prefill_rows
from tests.pallas_kernels.prefill_cases import PrefillCase
from tests.pallas_kernels.shapes import shape_of

SHAPE = shape_of((4, 2), (128, 128), 40)


@pytest.mark.parametrize("query_tile", [16, 32])
@pytest.mark.parametrize(
    ("rows", "decode_rows"),
    [
        (((5, 9, 0), (70, 20, 48), (0, 13, 0), (95, 1, 0)), 3),
        (((0, 16, 0), (7, 16, 0), (3, 32, 0)), 0),
        (((0, 17, 0), (9, 0, 0), (4, 1, 0)), 15),
        (((0, 64, 0),), 0),
        (((5, 0, 0),), 2),
    ],
    ids=str,
)
def test_each_token_is_in_one_visit(rows: tuple[tuple[int, int, int], ...], decode_rows: int, query_tile: int) -> None:
    tokens = PrefillCase(SHAPE, rows, 64, decode_rows).tokens
    tables = jnp.zeros((tokens.lanes.shape[0] + 1, SHAPE.table_width), jnp.int32)
    made = prefill_rows(SHAPE, tables, tokens, 64, query_tile)
    visits = np.asarray(made.visits).reshape(-1, VISIT_FIELDS)[: int(made.num_visits[0])]
    owners: dict[int, int] = {}
    for row, tile, begin, end, start, context in visits.tolist():
        assert (start, end - begin, context) == rows[row - decode_rows]
        for token in range(max(begin, tile * query_tile), min(end, (tile + 1) * query_tile)):
            assert token not in owners
            owners[token] = row
    starts = np.asarray(tokens.query_starts)
    expected = {t: row for row in range(decode_rows, len(starts) - 2) for t in range(starts[row], starts[row + 1])}
    assert owners == expected
