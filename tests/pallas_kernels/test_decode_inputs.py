"""What a decode refuses, and that it says what would do."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from pallas_kernels.decode_inputs import check_decode
from pallas_kernels.pages import AttentionShape, PageGeometry
from pallas_kernels.windowed_attention import ops
from tests.pallas_kernels.decode_cases import DecodeCase

SHAPE = AttentionShape(PageGeometry(16, 2, 128, 128), 4, 32, 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": jnp.zeros((2, 3, 128))}, r"queries has shape \(2, 3, 128\); \(2, 4, 128\)"),
        ({"keys": jnp.zeros((2, 2, 64))}, r"keys has shape"),
        ({"values": jnp.zeros((2, 2, 128), jnp.bfloat16)}, "values are bfloat16, the pool float32"),
        ({"sinks": jnp.zeros(3)}, r"sinks has shape \(3,\); \(4,\)"),
        ({"arena": jnp.zeros((1, 100, 128))}, "a multiple of 64 rows"),
    ],
    ids=["queries", "keys", "dtype", "sinks", "arena"],
)
def test_arrays_that_do_not_fit_are_named(change: dict, message: str) -> None:
    inputs = DecodeCase(SHAPE, (3, 40)).inputs()
    check_decode(SHAPE, inputs)
    with pytest.raises(ValueError, match=message):
        check_decode(SHAPE, inputs._replace(**change))


def test_blocks_smaller_than_a_tile_of_the_dtype() -> None:
    small = AttentionShape(PageGeometry(8, 2, 128, 128), 4, 32, 0.1)
    inputs = DecodeCase(small, (3,), dtype="bfloat16").inputs()
    with pytest.raises(ValueError, match="blocks of 8 tokens; bfloat16 needs a multiple of 16"):
        check_decode(small, inputs)


def test_more_rows_than_scalar_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "MOST_TABLE_ENTRIES", 5)
    inputs = DecodeCase(SHAPE, (3, 40)).inputs()
    with pytest.raises(ValueError, match="2 rows with tables of 3 entries; at most 1 rows fit"):
        ops.decode(SHAPE, inputs)
