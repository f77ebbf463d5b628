"""The KV arena on the device: allocation, and the only code that knows how a page lies in it.

An arena is ``[chips, rows, row_elements]``; inside ``shard_map`` each chip sees its own ``[1, rows, row_elements]``
and every function here takes that local array. A page id addresses one layer's part of a block: layer l of a group
reads page ``id + l``. Must never: allocate blocks (the host does), or be called outside ``shard_map`` (under GSPMD a
reshape of the arena costs twice its size in temporaries).

int8 keys and values have a second array beside the arena, with the scales of its rows (``pallas_kernels.scales``); what
is said here of an arena is then said of both, and what is read from them are floats.

16-bit values are stored as uint16 on CPU: XLA's CPU backend converts the whole array to float32 and back around a
bfloat16 scatter. The bits are the same; ``as_stored`` and ``as_values`` are free casts.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from hkv_jax.kvcache.format import LANES, NO_SLOT, KVFormat, PageLayout
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.sharding import MODEL_AXIS, OVER_CHIPS, named
from pallas_kernels.pages import PageGeometry
from pallas_kernels.reference_pages import floats_of_tokens
from pallas_kernels.scales import Arena, NewKV, ScaledArena, arena_of, is_scaled, quantise

ArenaArray = Arena
"""[chips, rows, row_elements]: one arena; uint16 stands for bfloat16 on CPU. Inside shard_map chips is 1.

Of int8, with the words of its scales, i32[chips, rows / 128, 128].
"""


def page_geometry(fmt: KVFormat) -> PageGeometry:
    """A page of planes as the kernels see it."""
    return PageGeometry(fmt.block_size, fmt.num_kv_heads, fmt.head_dim, fmt.head_dim)


def rounded(fmt: KVFormat, kv_dtype: jnp.dtype, keys: jax.Array, values: jax.Array) -> NewKV:
    """Keys and values [T, K, D] in the KV dtype: what is written, and what attention uses of a step's own tokens."""
    if is_scaled(kv_dtype):
        return quantise(keys, values, page_geometry(fmt))
    return NewKV(keys.astype(kv_dtype), values.astype(kv_dtype))


def as_read(fmt: KVFormat, new: NewKV) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a step's tokens as ``read_pages`` would give them."""
    return (new.keys, new.values) if new.words is None else floats_of_tokens(*new, page_geometry(fmt))


def storage_dtype(kv_dtype: jnp.dtype, platform: str) -> jnp.dtype:
    """The dtype the arena is declared with for values of ``kv_dtype``."""
    if platform == "cpu" and kv_dtype == jnp.bfloat16:
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(kv_dtype)


def arena_shapes(layout: KVLayout, mesh: Mesh, dtype: jnp.dtype) -> tuple[Any, ...]:
    """Shape, dtype and sharding of each arena before it exists."""
    shapes: list[Any] = []
    chips = mesh.shape[MODEL_AXIS]

    def struct(rows: int, width: int, dtype: jnp.dtype) -> Any:
        return jax.ShapeDtypeStruct((chips, rows, width), dtype, sharding=named(mesh, OVER_CHIPS))

    for index, arena in enumerate(layout.arenas):
        # Every group's row width divides into this one, so that each view is a reshape of the same bytes.
        formats = [group.format for group in layout.groups if group.arena == index]
        width = math.gcd(*(fmt.row_elements for fmt in formats))
        if is_scaled(dtype):
            rows = arena.total_bytes // formats[0].row_bytes
            shapes.append(ScaledArena(struct(rows, width, dtype), struct(rows // LANES, LANES, jnp.dtype(jnp.int32))))
        else:
            shapes.append(struct(arena.total_bytes // arena.itemsize // width, width, dtype))
    return tuple(shapes)


def _rows_of(arena: ArenaArray, fmt: KVFormat) -> list[jax.Array]:
    """A local arena row by row, [rows, row_elements], and of int8 the words, [rows]."""
    if isinstance(arena, ScaledArena):
        return [arena.values.reshape(-1, fmt.row_elements), arena.words.reshape(-1)]
    return [arena.reshape(-1, fmt.row_elements)]


def as_stored(values: jax.Array, arena: jax.Array) -> jax.Array:
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
    new: NewKV,
) -> ArenaArray:
    """Writes new keys and values of one layer to their slots.

    Args:
        arena: local, [1, rows, row_elements].
        fmt: the group's page format.
        layer: index of the layer within its group.
        slots: i32[T], page · P + offset of layer 0, or NO_SLOT.
        new: of the tokens.

    Returns:
        The arena, updated in place where it was donated.
    """
    views = _rows_of(arena, fmt)
    keys, values = (as_stored(part, views[0]) for part in (new.keys, new.values))
    new_rows = [_rows_of_tokens(fmt, keys, values), *([] if new.words is None else [new.words])]
    live = slots != NO_SLOT
    shift = jnp.asarray(layer, jnp.int32) * fmt.rows_per_page
    # NO_SLOT is replaced last, by a row past the end: mode="drop" wraps negative indices, so none may be negative.
    rows = jnp.where(live[:, None], _rows_of_slots(fmt, slots) + shift, views[0].shape[0]).reshape(-1)
    # One scatter through a view of rows: the only form that was in place on every supported jax (docs/benchmarks.md).
    written = [
        view.at[rows].set(one.reshape(-1, *view.shape[1:]), mode="drop")
        for view, one in zip(views, new_rows, strict=True)
    ]
    return arena_of(written, arena)


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
        keys and values, [n · P, K, D] each; float32 where they are stored as int8.
    """
    views = _rows_of(arena, fmt)
    heads, dim, tokens = fmt.num_kv_heads, fmt.head_dim, pages.shape[0] * fmt.block_size
    if fmt.layout is PageLayout.ROWS:
        taken = _take(views[0].reshape(-1, 2, fmt.block_size, fmt.row_elements), pages)
        keys, values = taken[:, 0].reshape(tokens, heads, dim), taken[:, 1].reshape(tokens, heads, dim)
    else:
        planes = _take(views[0].reshape(-1, fmt.num_planes, fmt.block_size, LANES), pages)
        # K and V of a head are the two halves of its planes, or (D <= 64) of its one plane.
        by_token = planes.transpose(0, 2, 1, 3).reshape(tokens, heads, 2, -1)
        keys, values = by_token[:, :, 0, :dim], by_token[:, :, 1, :dim]
    if len(views) > 1:
        words = _take(views[1].reshape(-1, fmt.num_planes, fmt.block_size), pages).transpose(0, 2, 1)
        keys, values = floats_of_tokens(keys, values, words.reshape(tokens, -1), page_geometry(fmt))
        kv_dtype = values.dtype
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
    rows, *words = _rows_of(arena, fmt)
    views = [rows.reshape(-1, fmt.rows_per_page, fmt.row_elements)]
    views += [one.reshape(-1, fmt.rows_per_page // LANES, LANES) for one in words]
    live = targets != NO_SLOT
    live_first = jnp.argsort(~live)  # stable: the copies keep their order

    def copy(number: jax.Array, views: list[jax.Array]) -> list[jax.Array]:
        entry = live_first[number]
        blocks = [lax.dynamic_slice_in_dim(view, sources[entry], fmt.num_layers) for view in views]
        return [
            lax.dynamic_update_slice_in_dim(view, block, targets[entry], 0)
            for view, block in zip(views, blocks, strict=True)
        ]

    return arena_of(lax.fori_loop(0, jnp.sum(live), copy, views), arena)


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
