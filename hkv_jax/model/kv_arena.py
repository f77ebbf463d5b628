"""The KV arena on the device: allocation, and the only code that knows how a page lies in it.

An arena is ``[chips, rows, row_elements]``; inside ``shard_map`` each chip sees its own ``[1, rows, row_elements]``
and every function here takes that local array. A page id addresses one layer's part of a block: layer l of a group
reads page ``id + l``. Must never: allocate blocks (the host does), or be called outside ``shard_map`` (under GSPMD a
reshape of the arena costs twice its size in temporaries).

16-bit values are stored as uint16 on CPU: XLA's CPU backend converts the whole array to float32 and back around a
bfloat16 scatter. The bits are the same; ``as_stored`` and ``as_values`` are free casts.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from hkv_jax.array_types import ArenaArray, KeysValues
from hkv_jax.kvcache.format import LANES, NO_SLOT, KVFormat, PageLayout
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.sharding import MODEL_AXIS, OVER_CHIPS, named


def storage_dtype(kv_dtype: jnp.dtype, platform: str) -> jnp.dtype:
    """The dtype the arena is declared with for values of ``kv_dtype``."""
    if platform == "cpu" and kv_dtype == jnp.bfloat16:
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(kv_dtype)


def arena_shapes(layout: KVLayout, mesh: Mesh, dtype: jnp.dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shape, dtype and sharding of each arena before it exists."""
    shapes = []
    for index, arena in enumerate(layout.arenas):
        # Every group's row width divides into this one, so that each view is a reshape of the same bytes.
        width = math.gcd(*(g.format.row_elements for g in layout.groups if g.arena == index))
        rows = arena.total_bytes // arena.itemsize // width
        shape = (mesh.shape[MODEL_AXIS], rows, width)
        shapes.append(jax.ShapeDtypeStruct(shape, dtype, sharding=named(mesh, OVER_CHIPS)))
    return tuple(shapes)


def as_stored(values: jax.Array, arena: ArenaArray) -> jax.Array:
    """Values in the bits of the arena's dtype."""
    return values if values.dtype == arena.dtype else lax.bitcast_convert_type(values, arena.dtype)


def as_values(stored: jax.Array, kv_dtype: jnp.dtype) -> jax.Array:
    """Bits read from the arena as values of ``kv_dtype``."""
    return stored if stored.dtype == kv_dtype else lax.bitcast_convert_type(stored, kv_dtype)


def write_kv(
    arena: ArenaArray,
    fmt: KVFormat,
    layer: jax.Array | int,
    slots: jax.Array,
    keys_values: tuple[KeysValues, KeysValues],
) -> ArenaArray:
    """Writes new keys and values of one layer to their slots.

    Args:
        arena: local, [1, rows, row_elements].
        fmt: the group's page format.
        layer: index of the layer within its group.
        slots: i32[T], page · P + offset of layer 0, or NO_SLOT.
        keys_values: [T, K, D] each, KV dtype.

    Returns:
        The arena, updated in place where it was donated.
    """
    keys, values = (as_stored(x, arena) for x in keys_values)
    rows_of_slot = _rows_of_slots(fmt, slots)
    live = slots != NO_SLOT
    view = arena.reshape(-1, fmt.row_elements)
    shift = jnp.asarray(layer, jnp.int32) * fmt.rows_per_page
    # NO_SLOT is replaced last, by a row past the end: mode="drop" wraps negative indices, so none may be negative.
    rows = jnp.where(live[:, None], rows_of_slot + shift, view.shape[0])
    # One scatter through a view of rows: the only form that was in place on every supported jax (docs/benchmarks.md).
    view = view.at[rows.reshape(-1)].set(_rows_of_tokens(fmt, keys, values).reshape(-1, fmt.row_elements), mode="drop")
    return view.reshape(arena.shape)


def read_pages(
    arena: ArenaArray, fmt: KVFormat, pages: jax.Array, live: jax.Array, kv_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of whole pages, in order.

    Args:
        arena: local, [1, rows, row_elements].
        fmt: the group's page format.
        pages: i32[n], page ids of one layer.
        live: bool[n · P]; values of other tokens are selected to 0, whatever a recycled page holds there.
        kv_dtype: what the stored bits are.

    Returns:
        keys and values, [n · P, K, D] each.
    """
    heads, dim, tokens = fmt.num_kv_heads, fmt.head_dim, pages.shape[0] * fmt.block_size
    if fmt.layout is PageLayout.ROWS:
        taken = _take(arena.reshape(-1, 2, fmt.block_size, fmt.row_elements), pages)
        keys, values = taken[:, 0].reshape(tokens, heads, dim), taken[:, 1].reshape(tokens, heads, dim)
    else:
        planes = _take(arena.reshape(-1, fmt.num_planes, fmt.block_size, LANES), pages)
        # K and V of a head are the two halves of its planes, or (D <= 64) of its one plane.
        by_token = planes.transpose(0, 2, 1, 3).reshape(tokens, heads, 2, -1)
        keys, values = by_token[:, :, 0, :dim], by_token[:, :, 1, :dim]
    values = jnp.where(live[:, None, None], values, jnp.zeros((), values.dtype))
    return as_values(keys, kv_dtype), as_values(values, kv_dtype)


def copy_blocks(arena: ArenaArray, fmt: KVFormat, sources: jax.Array, targets: jax.Array) -> ArenaArray:
    """Copies whole blocks (all layers of the group), one after the other: the memory of a single block is enough.

    Args:
        arena: local, [1, rows, row_elements].
        fmt: the group's page format.
        sources: i32[n], page of layer 0 of each source block.
        targets: i32[n], likewise; NO_SLOT for an entry that copies nothing, and costs nothing.
    """
    # The pages of a block follow each other. Only the first axis is cut, so that no layout has to move a row.
    view = arena.reshape(-1, fmt.rows_per_page, fmt.row_elements)
    live = targets != NO_SLOT
    live_first = jnp.argsort(~live)  # stable: the copies keep their order

    def copy(number: jax.Array, view: jax.Array) -> jax.Array:
        entry = live_first[number]
        block = lax.dynamic_slice_in_dim(view, sources[entry], fmt.num_layers)
        return lax.dynamic_update_slice_in_dim(view, block, targets[entry], 0)

    return lax.fori_loop(0, jnp.sum(live), copy, view).reshape(arena.shape)


def _take(view: jax.Array, index: jax.Array) -> jax.Array:
    # Ids are in range by construction; jnp's default would add a mask that fills with NaN.
    return view.at[index].get(mode="promise_in_bounds")


def _rows_of_slots(fmt: KVFormat, slots: jax.Array) -> jax.Array:
    """i32[T, rows a token]: the rows of layer 0 that a slot's token occupies (meaningless for NO_SLOT)."""
    safe = jnp.where(slots == NO_SLOT, 0, slots)
    page, offset = safe // fmt.block_size, safe % fmt.block_size
    first = page * fmt.rows_per_page + offset
    parts = fmt.rows_per_page // fmt.block_size
    return first[:, None] + jnp.arange(parts, dtype=jnp.int32) * fmt.block_size


def _rows_of_tokens(fmt: KVFormat, keys: jax.Array, values: jax.Array) -> jax.Array:
    """[T, rows a token, row_elements]: the rows of each token, in the order of ``_rows_of_slots``."""
    tokens, _, dim = keys.shape
    if fmt.layout is PageLayout.ROWS:
        return jnp.stack([keys.reshape(tokens, -1), values.reshape(tokens, -1)], axis=1)
    lanes_a_part = fmt.planes_per_head * LANES // 2
    padding = ((0, 0), (0, 0), (0, lanes_a_part - dim))
    both = jnp.stack([jnp.pad(keys, padding), jnp.pad(values, padding)], axis=2)
    return both.reshape(tokens, fmt.num_planes, LANES)
