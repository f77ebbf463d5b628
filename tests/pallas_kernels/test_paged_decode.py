"""Paged decode against its reference, interpreted; the whole pool compared. Tiles are small: rows have several."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from pallas_kernels import tiles
from pallas_kernels.paged_attention import ops
from pallas_kernels.paged_attention.ops import decode
from pallas_kernels.pages import AttentionShape, PageGeometry
from tests.pallas_kernels.decode_cases import DecodeCase, check_decode_case
from tests.pallas_kernels.shapes import BLOCK, shape_of

RAGGED = (0, -1, 1, 15, 16, 63, 64, 65, 200, -1, 131)
"""Positions about the edges of blocks and tiles."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of four blocks, or of fewer where pages are large."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 4 * BLOCK * 4 * 128 * 4)


def test_ragged_rows() -> None:
    case = DecodeCase(shape_of((4, 2), (128, 128)), RAGGED)
    assert tiles.paged_tiles(case.shape, jnp.dtype(jnp.float32)).blocks == 4
    check_decode_case(case, decode)


def test_a_row_without_a_slot_sees_what_the_pool_holds() -> None:
    check_decode_case(DecodeCase(shape_of((4, 2), (128, 128)), (7, 80, 64, 130), without_slot=(0, 1, 2)), decode)


@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((32, 4), (64, 64)),
        ((2, 2), (64, 64)),
        ((16, 1), (128, 128)),
        ((4, 1), (256, 256)),
        ((8, 1), (512, 512)),
        ((4, 2), (192, 128)),
        ((4, 2), (96, 96)),
        ((4, 2), (80, 80)),
    ],
    ids=str,
)
def test_head_shapes_in_bfloat16_with_sinks(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    check_decode_case(DecodeCase(shape_of(heads, dims), (33, 2, -1, 150), "bfloat16", "bfloat16", sinks=True), decode)


@pytest.mark.parametrize(("heads", "dim", "block"), [((4, 2), 128, 32), ((16, 4), 64, 32), ((2, 1), 64, 256)], ids=str)
def test_integers_with_scales(heads: tuple[int, int], dim: int, block: int) -> None:
    shape = AttentionShape(PageGeometry(block, heads[1], dim, dim), heads[0], None, dim**-0.5)
    positions = (0, -1, block - 1, 2 * block, 5 * block + 7)
    check_decode_case(DecodeCase(shape, positions, "int8", without_slot=(4,), sinks=dim == 64), decode)


def test_integers_with_queries_of_bfloat16() -> None:
    """As a TPU has them."""
    shape = AttentionShape(PageGeometry(32, 2, 128, 128), 4, None, 128**-0.5)
    check_decode_case(DecodeCase(shape, (0, 63, -1, 64, 200), "int8", "bfloat16", without_slot=(1,)), decode)


def test_writes_of_eight_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What chips before TPU7x write back of bfloat16: half of the tile that a CPU takes."""
    monkeypatch.setattr(ops, "write_rows", lambda _dtype: 8)
    shape = shape_of((4, 2), (128, 128), None)
    check_decode_case(DecodeCase(shape, (0, 7, 8, 15, 16, 90, -1), "bfloat16", "bfloat16", without_slot=(5,)), decode)


def test_queries_narrower_than_the_pool() -> None:
    check_decode_case(DecodeCase(shape_of((4, 2), (128, 128)), (3, 140), "float32", "bfloat16"), decode)


def test_soft_cap() -> None:
    check_decode_case(DecodeCase(shape_of((4, 2), (128, 128), soft_cap=0.7), (3, 140)), decode)


def test_tables_of_several_vectors() -> None:
    shape = AttentionShape(PageGeometry(8, 1, 64, 64), 2, None, 0.1)
    check_decode_case(DecodeCase(shape, (8 * 129 + 3, 5)), decode)


def test_every_row_idle() -> None:
    check_decode_case(DecodeCase(shape_of((4, 2), (128, 128)), (-1, -1)), decode)
