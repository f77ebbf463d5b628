"""Windowed decode against its reference, interpreted; the whole pool compared."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from pallas_kernels import tiles
from pallas_kernels.pages import AttentionShape, PageGeometry
from pallas_kernels.windowed_attention import ops
from pallas_kernels.windowed_attention.ops import decode
from tests.pallas_kernels.decode_cases import DecodeCase, check_decode_case
from tests.pallas_kernels.shapes import BLOCK, shape_of


def ragged(window: int) -> tuple[int, ...]:
    """Positions about the window's and a block's edge, from the first token on, and two rows that do nothing."""
    return (0, -1, 1, window - 1, window, 2 * window + 5, 3 * BLOCK - 1, 5 * BLOCK, -1, 7 * window + 2)


@pytest.mark.parametrize("window", [64, 48, 32, BLOCK, BLOCK - 1, BLOCK + 1, 50, 1])
def test_window_edges(window: int) -> None:
    shape = shape_of((4, 2), (128, 128), window)
    check_decode_case(DecodeCase(shape, ragged(window), without_slot=(5, 7)), decode)


@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((32, 4), (64, 64)),
        ((2, 2), (64, 64)),
        ((16, 1), (128, 128)),
        ((4, 1), (256, 256)),
        ((2, 1), (512, 512)),
        ((4, 2), (192, 128)),
        ((4, 2), (96, 96)),
        ((4, 2), (80, 80)),
        ((8, 2), (32, 32)),
    ],
    ids=str,
)
def test_head_shapes_in_bfloat16_with_sinks(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    shape = shape_of(heads, dims, 32)
    case = DecodeCase(shape, (33, 2, 31, -1, 100), "bfloat16", "bfloat16", without_slot=(0,), sinks=True)
    check_decode_case(case, decode)


@pytest.mark.parametrize(
    ("heads", "dim", "block", "window"),
    [((4, 2), 128, 32, 64), ((4, 2), 128, 64, 50), ((16, 4), 64, 32, 129), ((2, 1), 64, 128, 128)],
    ids=str,
)
def test_integers_with_scales(heads: tuple[int, int], dim: int, block: int, window: int) -> None:
    shape = AttentionShape(PageGeometry(block, heads[1], dim, dim), heads[0], window, dim**-0.5)
    positions = (0, -1, window - 1, window, 5 * window + 7, 3 * block)
    check_decode_case(DecodeCase(shape, positions, "int8", without_slot=(4,), sinks=dim == 64), decode)


def test_integers_with_queries_of_bfloat16() -> None:
    """As a TPU has them."""
    shape = AttentionShape(PageGeometry(32, 2, 128, 128), 4, 64, 128**-0.5)
    check_decode_case(DecodeCase(shape, (0, 63, -1, 64, 200), "int8", "bfloat16", without_slot=(1,)), decode)


@pytest.mark.parametrize(
    ("dtype", "block", "expected"),
    [("float32", BLOCK, (1, 1, 4)), ("int8", 32, (2, 1, 2)), ("float32", BLOCK, (2, 2, 4))],
)
def test_programs_take_turns_in_their_places(
    dtype: str, block: int, expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences, together, _ = expected
    shape = AttentionShape(PageGeometry(block, 2, 128, 128), 4, 64, 0.1)
    monkeypatch.setattr(tiles, "TOGETHER", ((2**30, together),))
    monkeypatch.setattr(tiles, "UNROLLED_ROWS", sequences * shape.table_width * shape.pages.rows)
    chosen = tiles.window_tiles(shape, jnp.dtype(dtype))
    assert chosen is not None and (chosen.sequences, chosen.together, chosen.turns) == expected
    # More rows than there is room for, and an odd number of them.
    check_decode_case(DecodeCase(shape, (*ragged(64), 40, 90, 3), dtype, without_slot=(5, 7)), decode)


def test_writes_of_eight_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What chips before TPU7x write back of bfloat16: half of the tile that a CPU takes."""
    monkeypatch.setattr(ops, "write_rows", lambda _dtype: 8)
    shape = shape_of((4, 2), (128, 128), 32)
    check_decode_case(DecodeCase(shape, ragged(32), "bfloat16", "bfloat16", without_slot=(5,)), decode)


def test_soft_cap() -> None:
    check_decode_case(DecodeCase(shape_of((4, 2), (128, 128), 32, soft_cap=0.7), (3, 40)), decode)


@pytest.mark.parametrize(("dtype", "query_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_queries_and_pool_of_two_dtypes(dtype: str, query_dtype: str) -> None:
    shape = shape_of((4, 2), (128, 128), 32)
    check_decode_case(DecodeCase(shape, (3, 40), dtype, query_dtype), decode)


def test_one_row() -> None:
    check_decode_case(DecodeCase(shape_of((4, 2), (128, 128), 48), (90,)), decode)


def test_nothing_below_the_start_of_the_context_is_read() -> None:
    """Rows just after a rebuild began: the ring holds nothing of what their windows would reach."""
    shape, starts = shape_of((4, 2), (128, 128), 48), (4 * BLOCK, 4 * BLOCK, 0, 2 * BLOCK)
    positions = (4 * BLOCK, 5 * BLOCK - 1, 40, 2 * BLOCK + 60)
    check_decode_case(DecodeCase(shape, positions, without_slot=(1,), context_starts=starts), decode)


def test_larger_row_tiles_than_one() -> None:
    shape = AttentionShape(PageGeometry(64, 1, 128, 128), 4, 128, 0.1)
    check_decode_case(DecodeCase(shape, (5, 63, 64, 130, 200), "bfloat16", "bfloat16"), decode)


@pytest.mark.parametrize(
    ("dtype", "block", "window"), [("float32", BLOCK, 64), ("float32", BLOCK, 50), ("int8", 32, 96)]
)
def test_a_window_too_large_for_vector_memory_is_read_in_tiles(
    dtype: str, block: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = AttentionShape(PageGeometry(block, 2, 128, 128), 4, window, 0.1)
    monkeypatch.setattr(tiles, "POOL_BYTES", 2 * shape.table_width * tiles.page_bytes(shape, jnp.dtype(dtype)) - 1)
    monkeypatch.setattr(ops, "MOST_TABLE_ENTRIES", 1)  # its tables are not in scalar memory
    assert tiles.window_tiles(shape, jnp.dtype(dtype)) is None
    check_decode_case(DecodeCase(shape, ragged(window), dtype, without_slot=(5, 7)), decode)


def test_every_row_idle() -> None:
    check_decode_case(DecodeCase(shape_of((4, 2), (128, 128), 32), (-1, -1, -1)), decode)
