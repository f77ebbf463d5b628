"""What the references read and write of a pool, slot by slot, with or without scales.

Owns: plain views of pages. Must never: be fast, or be used by a kernel.

Axis letters: T tokens, K kv heads, D head dim, C planes, P token slots of a block, N keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.pages import LANES, PageGeometry, token_planes
from pallas_kernels.scales import Arena, head_scales, pool_views


def slot_views(arena: Arena, pages: PageGeometry) -> list[jax.Array]:
    """The pool by page, plane and slot: rows [num_pages, C, P, 128], and of integers words [num_pages, C, P]."""
    rows, *words = pool_views(arena, pages)
    return [rows, *(one.reshape(-1, pages.num_planes, pages.block_size) for one in words)]


def token_rows(keys: jax.Array, values: jax.Array, words: jax.Array | None, pages: PageGeometry) -> list[jax.Array]:
    """What tokens put in their slots, in the order of ``slot_views``: rows [T, C, 128] and words [T, C]."""
    return [token_planes(keys, values, pages), *([] if words is None else [words])]


def floats_of_tokens(
    keys: jax.Array, values: jax.Array, words: jax.Array | None, pages: PageGeometry
) -> tuple[jax.Array, jax.Array]:
    """Keys and values f32[T, K, D], scaled where they have scales."""
    parts = keys.astype(jnp.float32), values.astype(jnp.float32)
    if words is None:
        return parts
    key_scales, value_scales = head_scales(words, pages)
    return parts[0] * key_scales[..., None], parts[1] * value_scales[..., None]


def floats_of_pages(arena: Arena, pages: PageGeometry, blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values f32[N, K, D] of whole blocks, token by token."""
    rows, *words = (view[blocks].swapaxes(1, 2) for view in slot_views(arena, pages))
    by_head = rows.reshape(-1, pages.num_kv_heads, pages.planes_per_head * LANES)
    value_begin = pages.value_lane if pages.shares_plane else pages.key_planes * LANES
    keys = by_head[..., : pages.key_dim]
    values = by_head[..., value_begin : value_begin + pages.value_dim]
    of_tokens = words[0].reshape(-1, pages.num_planes) if words else None
    return floats_of_tokens(keys, values, of_tokens, pages)
