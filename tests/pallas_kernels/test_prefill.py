"""Prefill against its reference, interpreted: windows and contexts, ragged rows, edges of every kind."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from pallas_kernels import tiles
from pallas_kernels.pages import AttentionShape, PageGeometry
from pallas_kernels.prefill_attention.ops import prefill
from pallas_kernels.prefill_attention.stretch_scales import ScalePlan
from pallas_kernels.prefill_attention.tile import choose_tile
from tests.pallas_kernels.prefill_cases import PrefillCase, check_prefill_case
from tests.pallas_kernels.shapes import BLOCK, shape_of

SMALL = shape_of((4, 2), (128, 128), 40)

# Rows in the middle of tiles and blocks; one that begins at the start, one after a rebuild began, one of one token.
RAGGED = ((5, 9, 0), (70, 20, 48), (0, 13, 0), (95, 1, 0))


@pytest.mark.parametrize("window", [1, BLOCK - 1, BLOCK, BLOCK + 1, 40, 200])
def test_window_edges_in_mixed_steps(window: int) -> None:
    shape = shape_of((4, 2), (128, 128), window)
    check_prefill_case(PrefillCase(shape, RAGGED, 64, decode_rows=3, tile=(("queries", 16),)))


@pytest.mark.parametrize("begin", [0, BLOCK - 1, BLOCK, BLOCK + 1])
def test_a_context_of_several_stretches(begin: int) -> None:
    shape = shape_of((4, 2), (128, 128), None)
    rows = ((begin, 9, 0), (700 + begin, 20, 0), (0, 13, 0))
    check_prefill_case(PrefillCase(shape, rows, 64, 3, tile=(("queries", 16), ("held_keys", 256))))


def test_a_window_of_several_stretches() -> None:
    shape = shape_of((2, 1), (128, 128), 600)
    case = PrefillCase(shape, ((590, 9, 0), (1300, 30, 0)), 64, tile=(("queries", 32), ("held_keys", 256)), sinks=True)
    assert not case.plan.one_pass
    check_prefill_case(case)


def test_a_window_longer_than_one_tile_of_keys() -> None:
    """More tiles than one go, so that blocks of plain tiles, edges and what is left over all run."""
    shape = shape_of((2, 1), (128, 128), 900)
    case = PrefillCase(shape, ((1000, 60, 0),), 64, tile=(("keys", 128), ("plain_tiles", 3), ("weighed_tiles", 3)))
    assert case.plan.one_pass
    check_prefill_case(case)


def test_a_tile_whose_oldest_key_only_the_last_query_no_longer_sees() -> None:
    shape = shape_of((2, 1), (128, 128), 300)
    case = PrefillCase(shape, ((397, 128, 0),), 128, tile=(("keys", 128), ("plain_tiles", 1)))
    # Keys from 96 on are fetched; those from 224 to 351 are a tile, and the last query, 524, sees from 225 on.
    assert case.plan.queries == 128
    check_prefill_case(case)


def test_a_tile_whose_newest_key_only_the_first_query_does_not_see() -> None:
    shape = shape_of((2, 1), (128, 128), None)
    check_prefill_case(PrefillCase(shape, ((126, 20, 0),), 32, tile=(("keys", 128), ("plain_tiles", 1))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((8, 2), (64, 64)),
        ((3, 1), (64, 64)),
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
@pytest.mark.parametrize("window", [40, None])
def test_head_shapes_in_bfloat16_with_sinks(heads: tuple[int, int], dims: tuple[int, int], window: int | None) -> None:
    rows = ((33, 20, 0), (0, 7, 0)) if window else ((33, 20, 0), (290, 7, 0))
    case = PrefillCase(shape_of(heads, dims, window), rows, 32, 2, "bfloat16", "bfloat16", sinks=True)
    check_prefill_case(case)


def test_heads_in_groups() -> None:
    case = PrefillCase(shape_of((8, 4), (128, 128), 40), RAGGED, 64, 3, tile=(("queries", 16), ("heads", 2)))
    assert case.plan.head_groups == 2
    check_prefill_case(case)


@pytest.mark.parametrize("window", [40, None])
def test_soft_cap(window: int | None) -> None:
    check_prefill_case(PrefillCase(shape_of((4, 2), (128, 128), window, soft_cap=0.7), ((50, 20, 0),), 32))


@pytest.mark.parametrize(
    ("dim", "block", "window", "held_keys"),
    [(128, 32, 40, None), (64, 64, None, 256), (128, 32, 300, 256)],
    ids=str,
)
def test_integers_with_scales(dim: int, block: int, window: int | None, held_keys: int | None) -> None:
    shape = AttentionShape(PageGeometry(block, 2, dim, dim), 4, window, dim**-0.5)
    tile = (("queries", 16), *([("held_keys", held_keys)] if held_keys else []))
    rows = ((5, 9, 0), (390, 20, 64)) if held_keys else ((5, 9, 0), (70, 20, 64))
    check_prefill_case(PrefillCase(shape, rows, 32, 2, "int8", tile=tile, sinks=dim == 64))


def test_scales_of_heads_in_groups_and_of_tokens_far_on() -> None:
    shape = AttentionShape(PageGeometry(64, 2, 128, 128), 4, 100, 0.1)
    tile = (("queries", 64), ("heads", 1), ("held_keys", 256))
    case = PrefillCase(shape, ((70, 440, 0),), 512, 2, "int8", tile=tile)
    plan = ScalePlan(case.plan)
    # Words of own tokens are not all fetched at once.
    assert case.plan.head_groups == 2 and plan.own_lanes < plan.own_tokens
    check_prefill_case(case)


def test_scales_of_blocks_of_several_rows() -> None:
    shape = AttentionShape(PageGeometry(256, 2, 64, 64), 4, 300, 0.125)
    check_prefill_case(PrefillCase(shape, ((390, 20, 0),), 32, 2, "int8", tile=(("queries", 16),)))


@pytest.mark.parametrize("window", [40, None])
def test_integers_with_queries_of_bfloat16(window: int | None) -> None:
    """As a TPU has them."""
    shape = AttentionShape(PageGeometry(32, 2, 128, 128), 4, window, 128**-0.5)
    check_prefill_case(PrefillCase(shape, ((5, 9, 0), (70, 20, 64)), 32, 2, "int8", "bfloat16"))


@pytest.mark.parametrize(("dtype", "query_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("window", [40, None])
def test_queries_and_pool_of_two_dtypes(window: int | None, dtype: str, query_dtype: str) -> None:
    shape = shape_of((4, 2), (128, 128), window)
    check_prefill_case(PrefillCase(shape, ((50, 20, 0),), 32, dtype=dtype, query_dtype=query_dtype))


def test_a_step_without_rows_to_prefill_leaves_all_outputs() -> None:
    case = PrefillCase(SMALL, ((5, 0, 0),), 32, decode_rows=3)
    check_prefill_case(case)


def test_shapes_that_do_not_fit_are_named() -> None:
    case = PrefillCase(SMALL, ((5, 9, 0),), 16)
    inputs = case.inputs()
    with pytest.raises(ValueError, match=r"values has shape \(16, 2, 64\); \(16, 2, 128\) is needed"):
        prefill(SMALL, inputs._replace(values=inputs.values[..., :64]))
    with pytest.raises(ValueError, match="keys are bfloat16, the pool float32; round them"):
        prefill(SMALL, inputs._replace(keys=inputs.keys.astype(jnp.bfloat16)))


def test_the_data_file_overrules_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    shape_fields = {"num_heads": 4, "num_kv_heads": 2, "key_dim": 128, "block_size": BLOCK}
    monkeypatch.setattr(tiles, "_data", lambda: {"windowed_prefill": [shape_fields | {"heads": 1, "keys": 128}]})
    float32 = jnp.dtype(jnp.float32)
    chosen = choose_tile(SMALL, 64, float32, float32)
    assert (chosen.heads, chosen.keys) == (1, 128)
    other = shape_of((4, 2), (128, 128), None)
    assert (choose_tile(other, 64, float32, float32).heads, choose_tile(other, 64, float32, float32).keys) == (2, 256)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("window", [None, 128, 1024, 4096])
@pytest.mark.parametrize("num_tokens", [16, 256, 8192])
def test_tiles_fit_the_smallest_vector_memory(group: int, window: int | None, num_tokens: int) -> None:
    for kv_heads, dim in ((16, 64), (16, 256), (4, 512), (1, 128)):
        shape = AttentionShape(PageGeometry(64, kv_heads, dim, dim), kv_heads * group, window, 1.0)
        for dtype in (jnp.bfloat16, jnp.float32):
            tile = choose_tile(shape, num_tokens, jnp.dtype(dtype), jnp.dtype(dtype))
            tile.check()
            assert tile.vmem_bytes <= 48 << 20
