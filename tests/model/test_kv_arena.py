"""Pages on the device: every element where the format says, and nothing else touched.

The whole arena is compared, bit by bit, with one that numpy loops filled; both start as NaN.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from hkv_jax.kvcache.format import NO_SLOT, KVFormat, PageLayout
from hkv_jax.kvcache.layout import plan_layout
from hkv_jax.model.kv_arena import (
    arena_shapes,
    as_read,
    as_stored,
    as_values,
    copy_blocks,
    read_pages,
    rounded,
    storage_dtype,
    write_kv,
)
from hkv_jax.sharding import MODEL_AXIS, make_mesh
from hkv_jax.testing.cache_layouts import tiny_group, tiny_layout_request
from pallas_kernels.scales import NewKV, ScaledArena

LAYERS = 3
PAGES = 5 * LAYERS
BLOCK = 4

FORMATS = [
    pytest.param(KVFormat(layout, BLOCK, heads, dim, itemsize, LAYERS), id=f"{layout}-K{heads}-D{dim}-{itemsize}B")
    for layout in PageLayout
    for itemsize in (4, 2)
    for heads, dim in ((2, 16), (1, 64), (3, 96), (2, 128), (1, 256))
]
Place = tuple[int, int, int, slice]


def nan_arena(fmt: KVFormat) -> NDArray:
    shape = (1, PAGES * fmt.rows_per_page, fmt.row_elements)
    if fmt.itemsize == 4:
        return np.full(shape, np.nan, np.float32)
    return np.full(shape, np.nan, ml_dtypes.bfloat16).view(np.uint16)


def kv_dtype(fmt: KVFormat) -> jnp.dtype:
    return jnp.dtype(jnp.float32 if fmt.itemsize == 4 else jnp.bfloat16)


def bits(array: NDArray) -> NDArray:
    array = np.asarray(array)
    return array.view(np.uint32 if array.dtype.itemsize == 4 else np.uint16)


def random_tokens(fmt: KVFormat, count: int) -> NDArray:
    """[2, count, K, D]: keys and values."""
    rng = np.random.default_rng(fmt.head_dim)
    return rng.normal(size=(2, count, fmt.num_kv_heads, fmt.head_dim)).astype(kv_dtype(fmt))


def stored(values: NDArray, fmt: KVFormat) -> NDArray:
    return values if fmt.itemsize == 4 else values.view(np.uint16)


def places(fmt: KVFormat, part: int, head: int) -> list[tuple[int, slice, slice]]:
    """Where K (part 0) or V (1) of a head lies in a page: (plane, lanes of the plane, dimensions of the head)."""
    dim = fmt.head_dim
    if fmt.layout is PageLayout.ROWS:
        return [(part, slice(head * dim, (head + 1) * dim), slice(0, dim))]
    if dim <= 64:
        return [(head, slice(64 * part, 64 * part + dim), slice(0, dim))]
    each = -(-dim // 128)
    found = []
    for number in range(each):
        size = min(128, dim - 128 * number)
        found.append((head * 2 * each + part * each + number, slice(0, size), slice(128 * number, 128 * number + size)))
    return found


def written(arena: NDArray, fmt: KVFormat, layer: int, slots: NDArray, keys_values: NDArray) -> NDArray:
    """What write_kv should leave behind."""
    pages = arena.copy().reshape(-1, fmt.num_planes, fmt.block_size, fmt.row_elements)
    for token, slot in enumerate(slots):
        if slot == NO_SLOT:
            continue
        page, offset = slot // fmt.block_size + layer, slot % fmt.block_size
        pages[page, :, offset] = 0  # a row is written whole, with zeros where no head lies
        for part in (0, 1):
            for head in range(fmt.num_kv_heads):
                for plane, lanes, dims in places(fmt, part, head):
                    pages[page, plane, offset, lanes] = stored(keys_values[part, token, head, dims], fmt)
    return pages.reshape(arena.shape)


write = partial(jax.jit, static_argnums=1)(write_kv)
read = partial(jax.jit, static_argnums=(1, 4))(read_pages)
copy = partial(jax.jit, static_argnums=1)(copy_blocks)

SLOTS = np.array([2 * LAYERS * BLOCK + 3, NO_SLOT, 0, 4 * LAYERS * BLOCK, NO_SLOT, 4 * LAYERS * BLOCK + 1], np.int32)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_token_is_written_where_the_format_says_and_nothing_else_changes(fmt: KVFormat) -> None:
    tokens = random_tokens(fmt, len(SLOTS))
    expected, arena = nan_arena(fmt), jnp.asarray(nan_arena(fmt))
    # The last layer too: NO_SLOT plus a layer's shift would wrap around to a row that exists.
    for layer in (1, LAYERS - 1):
        arena = write(arena, fmt, layer, SLOTS, NewKV(tokens[0], tokens[1], None))
        expected = written(expected, fmt, layer, SLOTS, tokens)
        np.testing.assert_array_equal(bits(arena), bits(expected))


@pytest.mark.parametrize("fmt", FORMATS)
def test_pages_are_read_in_order_and_what_is_not_live_has_value_zero(fmt: KVFormat) -> None:
    tokens = random_tokens(fmt, 2 * BLOCK)
    layer, blocks = 1, np.array([3, 1], np.int32) * LAYERS
    slots = (blocks[:, None] * BLOCK + np.arange(BLOCK, dtype=np.int32)).reshape(-1)
    slots[BLOCK + 2 :] = NO_SLOT
    arena = written(nan_arena(fmt), fmt, layer, slots, tokens)
    live = np.arange(2 * BLOCK) < BLOCK + 1
    keys, values = (np.asarray(x) for x in read(arena, fmt, blocks + layer, live, kv_dtype(fmt)))
    assert keys.dtype == values.dtype == kv_dtype(fmt)
    np.testing.assert_array_equal(keys[live], tokens[0][live])
    np.testing.assert_array_equal(values, np.where(live[:, None, None], tokens[1], np.zeros((), tokens.dtype)))


@pytest.mark.parametrize("fmt", FORMATS)
def test_blocks_are_copied_with_all_their_layers(fmt: KVFormat) -> None:
    rng = np.random.default_rng(1)
    arena = rng.integers(0, 2**16, nan_arena(fmt).shape).astype(nan_arena(fmt).dtype)
    sources = np.array([1, 0, 4, 0], np.int32) * LAYERS
    targets = np.array([2 * LAYERS, NO_SLOT, 0, NO_SLOT], np.int32)
    expected = arena.copy().reshape(PAGES, -1)
    for source, target in ((1, 2), (4, 0)):
        expected[target * LAYERS : (target + 1) * LAYERS] = expected[source * LAYERS : (source + 1) * LAYERS]
    np.testing.assert_array_equal(np.asarray(copy(arena, fmt, sources, targets)).reshape(PAGES, -1), expected)


INTEGERS = KVFormat(PageLayout.PLANES, 32, num_kv_heads=2, head_dim=80, itemsize=1, num_layers=LAYERS)


def test_integers_are_read_as_what_they_were_rounded_to() -> None:
    fmt, tokens = INTEGERS, 40
    rng = np.random.default_rng(3)
    keys, values = rng.normal(size=(2, tokens, 2, 80)).astype(np.float32)
    new = rounded(fmt, jnp.dtype(jnp.int8), jnp.asarray(keys), jnp.asarray(values))
    layer, blocks = 1, np.array([3, 1], np.int32) * LAYERS
    slots = (blocks[:, None] * 32 + np.arange(32, dtype=np.int32)).reshape(-1)[:tokens]
    slots[5] = NO_SLOT
    num_rows = PAGES * fmt.rows_per_page
    nan = jnp.full((1, num_rows // 128, 128), 0x7FC00000, jnp.int32)
    empty = ScaledArena(jnp.full((1, num_rows, 128), 99, jnp.int8), nan)
    arena = write(empty, fmt, layer, slots, new)
    assert isinstance(arena, ScaledArena)
    live = np.arange(64) < tokens
    live[5] = False
    read_keys, read_values = (np.asarray(x) for x in read(arena, fmt, blocks + layer, live, jnp.dtype(jnp.int8)))
    for back, expected, exact in zip((read_keys, read_values), as_read(fmt, new), (keys, values), strict=True):
        assert back.dtype == np.float32
        np.testing.assert_array_equal(back[:tokens][live[:tokens]], np.asarray(expected)[live[:tokens]])
        assert np.abs(back[:tokens] - exact)[live[:tokens]].max() < 0.02
    assert not read_values[~live].any()
    # The words of all that was not written are as they were.
    words = np.asarray(arena.words).reshape(PAGES, fmt.num_planes, 32)
    written = (words != 0x7FC00000).any(axis=1)
    assert written.sum() == tokens - 1
    assert not written[blocks[0] + layer, 5]


def test_scales_are_copied_with_their_blocks() -> None:
    fmt, rng = INTEGERS, np.random.default_rng(1)
    rows = rng.integers(-127, 128, (1, PAGES * fmt.rows_per_page, 128)).astype(np.int8)
    words = rng.integers(0, 2**31, (1, rows.shape[1] // 128, 128)).astype(np.int32)
    arena = ScaledArena(jnp.asarray(rows), jnp.asarray(words))
    copied = copy(arena, fmt, np.array([LAYERS], np.int32), np.array([0], np.int32))
    for part, before in zip(copied, (rows, words), strict=True):
        after, pages = np.asarray(part).reshape(PAGES, -1), np.asarray(before).reshape(PAGES, -1)
        np.testing.assert_array_equal(after[:LAYERS], pages[LAYERS : 2 * LAYERS])
        np.testing.assert_array_equal(after[LAYERS:], pages[LAYERS:])


def test_copies_happen_one_after_the_other() -> None:
    fmt = KVFormat(PageLayout.ROWS, BLOCK, 1, 8, 4, LAYERS)
    arena = np.arange(PAGES * fmt.page_elements, dtype=np.float32).reshape(1, -1, fmt.row_elements)
    # A block leaves for the last place, and the next one takes the place it left.
    copied = copy(arena, fmt, np.array([0, 7, LAYERS], np.int32), np.array([4 * LAYERS, NO_SLOT, 0], np.int32))
    blocks, before = np.asarray(copied).reshape(5, -1), arena.reshape(5, -1)
    np.testing.assert_array_equal(blocks, before[[1, 1, 2, 3, 0]])


def test_only_bfloat16_on_cpu_is_stored_as_other_bits() -> None:
    assert storage_dtype(jnp.dtype(jnp.bfloat16), "cpu") == jnp.uint16
    assert storage_dtype(jnp.dtype(jnp.float32), "cpu") == jnp.float32
    assert storage_dtype(jnp.dtype(jnp.bfloat16), "tpu") == jnp.bfloat16


def test_stored_bits_come_back_as_the_same_values() -> None:
    values = jnp.asarray([0.0, -1.5, np.inf, 3e-39, np.nan], jnp.bfloat16)
    there = as_stored(values, jnp.zeros((), jnp.uint16))
    assert there.dtype == jnp.uint16
    np.testing.assert_array_equal(bits(np.asarray(as_values(there, jnp.dtype(jnp.bfloat16)))), bits(np.asarray(values)))


@pytest.mark.parametrize(("partition", "num_arenas"), [("moving", 1), ("static", 2)])
def test_arenas_hold_the_bytes_of_the_layout_on_every_chip(partition: str, num_arenas: int) -> None:
    mesh = make_mesh(2)
    # Rows of 8 and 12 elements on a chip: neither divides the other.
    groups = (tiny_group(None, num_kv_heads=2, head_dim=8), tiny_group(16, num_kv_heads=2, head_dim=12))
    layout = plan_layout(tiny_layout_request(partition=partition, tensor_parallel=2, groups=groups))
    shapes = arena_shapes(layout, mesh, jnp.dtype(jnp.float32))
    assert len(shapes) == num_arenas
    for shape, arena in zip(shapes, layout.arenas, strict=True):
        assert shape.shape[0] == mesh.shape[MODEL_AXIS]
        assert np.prod(shape.shape[1:]) * 4 == arena.total_bytes
        assert shape.sharding.shard_shape(shape.shape)[0] == 1
    for group in layout.groups:
        assert group.format.row_elements % shapes[group.arena].shape[2] == 0
