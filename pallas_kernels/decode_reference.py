"""Decode attention over pages in plain jnp, one row after the other: what the kernels must agree with.

Owns: the meaning of the kernels' arguments, for windowed and global layers. Must never: be fast.

Axis letters: S rows, H query heads, K kv heads, D head dim, C planes, P token slots of a block, N keys of a table row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_inputs import DecodeInputs
from pallas_kernels.pages import NO_SLOT, AttentionShape, PageGeometry
from pallas_kernels.reference_pages import floats_of_pages, floats_of_tokens, slot_views, token_rows
from pallas_kernels.scales import Arena, arena_of


def decode_reference(shape: AttentionShape, inputs: DecodeInputs) -> tuple[jax.Array, Arena]:
    """Outputs f32[S, H, Dv] and the arena, as ``ops.decode`` gives them."""
    written = _written(shape.pages, inputs)
    outputs = [_attend(shape, inputs, written, row) for row in range(inputs.queries.shape[0])]
    return jnp.stack(outputs), written


def _written(pages: PageGeometry, inputs: DecodeInputs) -> Arena:
    rows_and_words = token_rows(inputs.keys, inputs.values, inputs.words, pages)
    views = slot_views(inputs.arena, pages)
    for row, slot in enumerate(inputs.rows.slots.tolist()):
        if slot != NO_SLOT and inputs.rows.kv_lens[row] > 0:
            page, offset = divmod(slot, pages.block_size)
            views = [
                view.at[page + inputs.layer, :, offset].set(new[row])
                for view, new in zip(views, rows_and_words, strict=True)
            ]
    return arena_of(views, inputs.arena)


def _attend(shape: AttentionShape, inputs: DecodeInputs, arena: Arena, row: int) -> jax.Array:
    pages = shape.pages
    kv_len = int(inputs.rows.kv_lens[row])
    if kv_len == 0:
        return jnp.zeros((shape.num_heads, pages.value_dim), jnp.float32)
    blocks = inputs.rows.tables[row].reshape(-1)[: -(-kv_len // pages.block_size)] + inputs.layer
    keys, values = (part[:kv_len] for part in floats_of_pages(arena, pages, blocks))
    if shape.window is not None:
        # The row's own key comes from the activations, whether or not it has a slot.
        first = max(kv_len - shape.window, 0)
        own_keys, own_values = floats_of_tokens(inputs.keys, inputs.values, inputs.words, pages)
        keys, values = keys.at[-1].set(own_keys[row])[first:], values.at[-1].set(own_values[row])[first:]
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
