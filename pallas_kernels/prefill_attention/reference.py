"""Prefill attention in plain jnp, one visit after the other: what the kernel must agree with.

Owns: the meaning of the kernel's arguments. Must never: be fast.

Axis letters: T tokens, H query heads, K kv heads, D head dim, C planes, P token slots of a block, N keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.pages import AttentionShape
from pallas_kernels.prefill_attention.ops import PrefillInputs
from pallas_kernels.prefill_rows import VISIT_FIELDS
from pallas_kernels.reference_pages import floats_of_pages, floats_of_tokens


def prefill_reference(shape: AttentionShape, inputs: PrefillInputs, query_tile: int) -> jax.Array:
    """Outputs f32[T, H, Dv] as ``ops.prefill`` gives them; ``query_tile`` is that of ``inputs.rows``."""
    outputs = inputs.outputs.astype(jnp.float32)
    for number in range(int(inputs.rows.num_visits[0])):
        fields = inputs.rows.visits[number * VISIT_FIELDS : (number + 1) * VISIT_FIELDS].tolist()
        row, tile, begin, end, start, context = fields
        keys, values = _keys_values(shape, inputs, (row, begin, end, start, context))
        tokens = jnp.arange(max(begin, tile * query_tile), min(end, (tile + 1) * query_tile))
        positions, of_keys = start + tokens - begin, jnp.arange(keys.shape[0])
        seen = of_keys <= positions[:, None]
        if shape.window is not None:
            seen &= (of_keys > positions[:, None] - shape.window) & (of_keys >= context)
        looked_at = seen.any(axis=0)[:, None, None]
        keys, values = (jnp.where(looked_at, x, 0) for x in (keys, values))
        outputs = outputs.at[tokens].set(_attend(shape, (inputs.queries[tokens], keys, values), seen, inputs.sinks))
    return outputs


def _keys_values(
    shape: AttentionShape, inputs: PrefillInputs, row_fields: tuple[int, int, int, int, int]
) -> tuple[jax.Array, jax.Array]:
    """Keys and values f32[N, K, D] of a row by position, those nobody may look at NaN."""
    row, begin, end, start, context = row_fields
    pages, length = shape.pages, start + end - begin
    if shape.window is None:
        first, last = 0, length
        table = inputs.rows.tables[row].reshape(-1)
    else:
        first, last = max(start - shape.window + 1, context) // pages.block_size * pages.block_size, start
        table = inputs.rows.tables[row]
    blocks = table[: -(-max(last - first, 0) // pages.block_size)] + inputs.layer
    count = max(last - first, 0)
    filled = []
    for part in floats_of_pages(inputs.arena, pages, blocks):
        unseen = jnp.full((length, *part.shape[1:]), jnp.nan, jnp.float32)
        filled.append(unseen.at[first : first + count].set(part[:count]))
    keys, values = filled
    if shape.window is not None:
        own = floats_of_tokens(inputs.keys, inputs.values, inputs.words, pages)
        keys, values = (part.at[start:].set(new[begin:end]) for part, new in zip((keys, values), own, strict=True))
    return keys, values


def _attend(
    shape: AttentionShape, arrays: tuple[jax.Array, jax.Array, jax.Array], seen: jax.Array, sinks: jax.Array | None
) -> jax.Array:
    queries, keys, values = arrays
    kv_heads = shape.pages.num_kv_heads
    by_head = queries.astype(jnp.float32).reshape(queries.shape[0], kv_heads, -1, shape.pages.key_dim)
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("qkgd,nkd->kgqn", by_head, keys) * shape.scale
        if shape.soft_cap is not None:
            scores = shape.soft_cap * jnp.tanh(scores / shape.soft_cap)
        scores = jnp.where(seen, scores, -jnp.inf)
        if sinks is not None:
            of_heads = jnp.broadcast_to(sinks.reshape(kv_heads, -1, 1, 1), (*scores.shape[:3], 1))
            scores = jnp.concatenate([scores, of_heads.astype(jnp.float32)], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., : keys.shape[0]]
        outputs = jnp.einsum("kgqn,nkd->qkgd", weights, values)
    return outputs.reshape(queries.shape[0], shape.num_heads, -1)
