"""Decode attention over pages in plain jnp, one row after the other: what the kernels must agree with.

Owns: the meaning of the kernels' arguments, for windowed and global layers. Must never: be fast.

Axis letters: S rows, H query heads, K kv heads, D head dim, C planes, P token slots of a block, N keys of a table row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_inputs import DecodeInputs
from pallas_kernels.pages import LANES, NO_SLOT, AttentionShape, PageGeometry, as_pages, token_planes


def decode_reference(shape: AttentionShape, inputs: DecodeInputs) -> tuple[jax.Array, jax.Array]:
    """Outputs f32[S, H, Dv] and the arena, as ``ops.decode`` gives them."""
    written = _written(shape.pages, inputs)
    outputs = [_attend(shape, inputs, written, row) for row in range(inputs.queries.shape[0])]
    return jnp.stack(outputs), written


def _written(pages: PageGeometry, inputs: DecodeInputs) -> jax.Array:
    view = as_pages(inputs.arena, pages)
    new_rows = token_planes(inputs.keys, inputs.values, pages)
    for row, slot in enumerate(inputs.rows.slots.tolist()):
        if slot != NO_SLOT and inputs.rows.kv_lens[row] > 0:
            page, offset = divmod(slot, pages.block_size)
            view = view.at[page + inputs.layer, :, offset].set(new_rows[row])
    return view.reshape(inputs.arena.shape)


def _attend(shape: AttentionShape, inputs: DecodeInputs, arena: jax.Array, row: int) -> jax.Array:
    pages = shape.pages
    kv_len = int(inputs.rows.kv_lens[row])
    if kv_len == 0:
        return jnp.zeros((shape.num_heads, pages.value_dim), jnp.float32)
    blocks = inputs.rows.tables[row].reshape(-1)[: -(-kv_len // pages.block_size)] + inputs.layer
    planes = (
        as_pages(arena, pages)[blocks].swapaxes(1, 2).reshape(-1, pages.num_kv_heads, pages.planes_per_head * LANES)
    )
    keys = planes[:kv_len, :, : pages.key_dim].astype(jnp.float32)
    value_begin = pages.value_lane if pages.shares_plane else pages.key_planes * LANES
    values = planes[:kv_len, :, value_begin : value_begin + pages.value_dim].astype(jnp.float32)
    if shape.window is not None:
        # The row's own key comes from the activations, whether or not it has a slot.
        first = max(kv_len - shape.window, 0)
        keys = keys.at[-1].set(inputs.keys[row].astype(jnp.float32))[first:]
        values = values.at[-1].set(inputs.values[row].astype(jnp.float32))[first:]
    queries = inputs.queries[row].astype(jnp.float32).reshape(pages.num_kv_heads, -1, pages.key_dim)
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("kgd,nkd->kgn", queries, keys) * shape.scale
        if shape.soft_cap is not None:
            scores = shape.soft_cap * jnp.tanh(scores / shape.soft_cap)
        if inputs.sinks is not None:
            sinks = inputs.sinks.astype(jnp.float32).reshape(pages.num_kv_heads, -1, 1)
            scores = jnp.concatenate([scores, sinks], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., : keys.shape[0]]
        return jnp.einsum("kgn,nkd->kgd", weights, values).reshape(shape.num_heads, pages.value_dim)
