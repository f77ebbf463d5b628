"""Paged attention in plain XLA: the path of CPU and GPU, and the reference of the TPU kernels.

Owns: the loops over rows, query tiles and key tiles of one layer inside ``shard_map``. Cost follows the live context
and the window, never ``max_model_len``: every loop has a trip count computed from the step's own positions. Must
never: write the arena, or know where its pages lie (``kv_arena`` does).

Softmax is the online form (Milakov & Gimelshein, arXiv 1805.02867): a running maximum, denominator and weighted sum
over tiles of keys, in float32. A row without keys gives 0.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hkv_jax.kvcache.format import KVFormat
from hkv_jax.model.kv_arena import read_pages

MASKED = -1e30
"""Score of a key that is not seen; finite, so that differences of two of them are not NaN."""

DECODE_TILE_TOKENS = 128
QUERY_TILE_TOKENS = 128
KEY_TILE_TOKENS = 256


class AttentionBackend(enum.StrEnum):
    """What computes attention and writes K/V."""

    XLA = "xla"
    """Plain XLA, anywhere."""

    PALLAS = "pallas"
    """The kernels for TPU, interpreted elsewhere."""


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is static of one group's attention.

    ``window`` is in tokens, ``None`` for global; ``table_width`` is the number of columns M of the group's tables;
    scores are q·k times ``scale``; ``kv_dtype`` is what the bits in the pool are.
    """

    format: KVFormat
    window: int | None
    table_width: int
    scale: float
    soft_cap: float | None
    kv_dtype: jnp.dtype
    backend: AttentionBackend = AttentionBackend.XLA


class StepRows(NamedTuple):
    """Rows of a step as attention needs them, all i32.

    lanes [S]; start_positions [S]: position of the first query; context_starts [S]: sliding layers neither see nor read
    what is below it, a multiple of every block size; query_starts [S + 1]; num_rows, num_decode_rows [].
    """

    lanes: Any
    start_positions: Any
    context_starts: Any
    query_starts: Any
    num_rows: Any
    num_decode_rows: Any


class AttentionInputs(NamedTuple):
    """Arrays of one layer, local to a chip.

    queries [T, H, D]; keys, values [T, K, D] of the step's own tokens, as they will be read; arena; layer: index in the
    group; tables i32[Z, M]; rows; sinks f32[H] or None: a learned score per head that takes probability and gives
    nothing.
    """

    queries: Any
    keys: Any
    values: Any
    arena: Any
    layer: Any
    tables: Any
    rows: StepRows
    sinks: Any


class _Softmax(NamedTuple):
    """Running maximum and denominator f32[K, Q], weighted sum f32[K, Q, D]; Q counts queries times heads a group."""

    maximum: jax.Array
    denominator: jax.Array
    total: jax.Array


class _Queries(NamedTuple):
    """A tile of queries of one row: values [K, Q, D]; positions i32[Q]; lane, row scalars."""

    values: jax.Array
    positions: jax.Array
    lane: jax.Array
    row: jax.Array


def paged_attention(spec: AttentionSpec, inputs: AttentionInputs, has_prefill: bool) -> jax.Array:
    """Attention of every live query of a step over the keys it may see.

    Global layers read everything, the step's own tokens included, through the table (they were written before).
    Sliding layers read through the table only positions from the row's context start to its first query, and the step's
    own keys from ``inputs.keys``.

    Args:
        spec: static description.
        inputs: arrays; the arena already holds the step's writes.
        has_prefill: whether rows may have more than one query.

    Returns:
        [T, H, D], the dtype of the queries. Positions past the live tokens hold unspecified finite values.
    """
    num_tokens, heads, dim = inputs.queries.shape
    tile = min(QUERY_TILE_TOKENS, num_tokens) if has_prefill else 1
    padded = jnp.zeros((num_tokens + tile, heads, dim), inputs.queries.dtype)
    outputs = lax.fori_loop(0, inputs.rows.num_decode_rows, lambda r, out: _decode_row(spec, inputs, r, out), padded)
    if has_prefill:
        outputs = _prefill_rows(spec, inputs, tile, outputs)
    return outputs[:num_tokens]


def _decode_row(spec: AttentionSpec, inputs: AttentionInputs, row: jax.Array, outputs: jax.Array) -> jax.Array:
    rows = inputs.rows
    position = rows.start_positions[row]
    queries = _query_tile(inputs, row, row, position, 1)
    state = _initial(queries, inputs.sinks)
    first_key = jnp.int32(0)
    end_key = position + 1
    if spec.window is not None:
        first_key, end_key = jnp.maximum(position - spec.window + 1, rows.context_starts[row]), position
        own_keys = lax.dynamic_slice_in_dim(inputs.keys, row, 1)
        own_values = lax.dynamic_slice_in_dim(inputs.values, row, 1)
        state = _accumulate(spec, state, queries.values, (own_keys, own_values), jnp.ones((1, 1), bool))
    tile_blocks = _decode_tile_blocks(spec)
    state = _accumulate_pool(spec, inputs, queries, (first_key, end_key, tile_blocks), state)
    return _store(state, outputs, row, 1)


def _decode_tile_blocks(spec: AttentionSpec) -> int:
    """Blocks a key tile of decode covers: a window is cut into equal tiles, so that the last is not mostly empty."""
    table_tokens = spec.table_width * spec.format.block_size
    if spec.window is None or table_tokens <= DECODE_TILE_TOKENS:
        return max(1, min(DECODE_TILE_TOKENS // spec.format.block_size, spec.table_width))
    num_tiles = -(-table_tokens // DECODE_TILE_TOKENS)
    return -(-spec.table_width // num_tiles)


def _prefill_rows(spec: AttentionSpec, inputs: AttentionInputs, tile: int, outputs: jax.Array) -> jax.Array:
    """Query tiles of longer rows, in token order: what a tile's tail spills is overwritten by the next."""
    rows = inputs.rows
    index = jnp.arange(rows.lanes.shape[0], dtype=jnp.int32)
    lengths = jnp.diff(rows.query_starts)
    chunked = (index >= rows.num_decode_rows) & (index < rows.num_rows)
    tile_ends = jnp.cumsum(jnp.where(chunked, -(-lengths // tile), 0))
    pad = ((0, tile + KEY_TILE_TOKENS), (0, 0), (0, 0))
    padded = inputs._replace(
        queries=jnp.pad(inputs.queries, pad), keys=jnp.pad(inputs.keys, pad), values=jnp.pad(inputs.values, pad)
    )

    def one_tile(number: jax.Array, outputs: jax.Array) -> jax.Array:
        row = jnp.searchsorted(tile_ends, number, side="right").astype(jnp.int32)
        tile_in_row = number - jnp.where(row > 0, tile_ends[row - 1], 0)
        token = rows.query_starts[row] + tile_in_row * tile
        position = rows.start_positions[row] + tile_in_row * tile
        queries = _query_tile(padded, row, token, position, tile)
        state = _initial(queries, inputs.sinks)
        row_end = rows.start_positions[row] + lengths[row]
        tile_end = jnp.minimum(position + tile, row_end)
        first_key, pool_end = jnp.int32(0), tile_end
        if spec.window is not None:
            first_key = jnp.maximum(position - spec.window + 1, rows.context_starts[row])
            pool_end = rows.start_positions[row]
            own_tile = min(KEY_TILE_TOKENS, inputs.keys.shape[0])
            state = _accumulate_own(spec, padded, queries, (first_key, tile_end, own_tile), state)
        tile_blocks = max(1, min(KEY_TILE_TOKENS // spec.format.block_size, spec.table_width))
        state = _accumulate_pool(spec, padded, queries, (first_key, pool_end, tile_blocks), state)
        return _store(state, outputs, token, tile)

    return lax.fori_loop(0, tile_ends[-1], one_tile, outputs)


def _query_tile(inputs: AttentionInputs, row: jax.Array, token: jax.Array, position: jax.Array, size: int) -> _Queries:
    kv_heads, dim = inputs.keys.shape[1:]
    taken = lax.dynamic_slice_in_dim(inputs.queries, token, size)
    by_head = taken.reshape(size, kv_heads, -1, dim).transpose(1, 0, 2, 3)
    heads_a_group = by_head.shape[2]
    positions = jnp.repeat(position + jnp.arange(size, dtype=jnp.int32), heads_a_group)
    return _Queries(by_head.reshape(kv_heads, -1, dim), positions, inputs.rows.lanes[row], row)


def _initial(queries: _Queries, sinks: jax.Array | None) -> _Softmax:
    kv_heads, num_queries, dim = queries.values.shape
    shape = (kv_heads, num_queries)
    total = jnp.zeros((*shape, dim), jnp.float32)
    if sinks is None:
        return _Softmax(jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), total)
    # A sink is a key whose score is learned and whose value is zero.
    by_head = sinks.astype(jnp.float32).reshape(kv_heads, -1)
    return _Softmax(jnp.tile(by_head, (1, num_queries // by_head.shape[1])), jnp.ones(shape, jnp.float32), total)


def _accumulate_pool(
    spec: AttentionSpec,
    inputs: AttentionInputs,
    queries: _Queries,
    span: tuple[jax.Array, jax.Array, int],
    state: _Softmax,
) -> _Softmax:
    """Adds keys at positions [first, end) through the row's table, ``tile_blocks`` blocks at a time."""
    first_key, end_key, tile_blocks = span
    block = spec.format.block_size
    tile_tokens = tile_blocks * block
    first_block = first_key // block
    num_tiles = jnp.where(end_key > first_key, -(-(end_key - first_block * block) // tile_tokens), 0)
    steps = jnp.arange(tile_blocks, dtype=jnp.int32)
    offsets = jnp.arange(tile_tokens, dtype=jnp.int32)

    def one_tile(number: jax.Array, state: _Softmax) -> _Softmax:
        tile_block = first_block + number * tile_blocks
        columns = (tile_block + steps) % spec.table_width
        pages = inputs.tables[queries.lane, columns] + inputs.layer
        positions = tile_block * block + offsets
        live = (positions >= first_key) & (positions < end_key)
        keys_values = read_pages(inputs.arena, spec.format, pages, live, spec.kv_dtype)
        return _accumulate(spec, state, queries.values, keys_values, _seen(spec, queries, positions, live))

    return lax.fori_loop(0, num_tiles, one_tile, state)


def _accumulate_own(
    spec: AttentionSpec,
    padded: AttentionInputs,
    queries: _Queries,
    span: tuple[jax.Array, jax.Array, int],
    state: _Softmax,
) -> _Softmax:
    """Adds the row's own keys of this step at positions [first, end), from the activations, ``size`` at a time."""
    first_key, end_key, size = span
    start = padded.rows.start_positions[queries.row]
    token_of_start = padded.rows.query_starts[queries.row]
    first_own = jnp.maximum(first_key, start)
    num_tiles = -(-(end_key - first_own) // size)
    offsets = jnp.arange(size, dtype=jnp.int32)

    def one_tile(number: jax.Array, state: _Softmax) -> _Softmax:
        begin = first_own + number * size
        token = token_of_start + begin - start
        positions = begin + offsets
        live = positions < end_key
        keys = lax.dynamic_slice_in_dim(padded.keys, token, size)
        # The tokens of other rows are selected to 0: where one row's numbers overflow, weight 0 times them is NaN.
        values = jnp.where(live[:, None, None], lax.dynamic_slice_in_dim(padded.values, token, size), 0)
        return _accumulate(spec, state, queries.values, (keys, values), _seen(spec, queries, positions, live))

    return lax.fori_loop(0, num_tiles, one_tile, state)


def _seen(spec: AttentionSpec, queries: _Queries, positions: jax.Array, live: jax.Array) -> jax.Array:
    """bool[Q, N]: which keys each query sees."""
    distance = queries.positions[:, None] - positions[None, :]
    seen = live[None, :] & (distance >= 0)
    return seen if spec.window is None else seen & (distance < spec.window)


def _accumulate(
    spec: AttentionSpec, state: _Softmax, queries: jax.Array, keys_values: tuple[jax.Array, jax.Array], seen: jax.Array
) -> _Softmax:
    """One step of the online softmax over a tile of keys: queries [K, Q, D], keys and values [N, K, D], seen [Q, N]."""
    # Heads first: with the batch axis in the middle XLA's CPU backend leaves its fast products, 2 to 3 times slower.
    keys, values = (jnp.swapaxes(part, 0, 1) for part in keys_values)
    scores = jnp.einsum("kqd,knd->kqn", queries, keys, preferred_element_type=jnp.float32) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(seen[None], scores, MASKED)
    maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=-1))
    # The select keeps a tile without a seen key at weight 0: there exp(MASKED - MASKED) would be 1.
    weights = jnp.where(seen[None], jnp.exp(scores - maximum[..., None]), 0.0)
    shrink = jnp.exp(state.maximum - maximum)
    weighted = jnp.einsum("kqn,knd->kqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return _Softmax(
        maximum, state.denominator * shrink + jnp.sum(weights, axis=-1), state.total * shrink[..., None] + weighted
    )


def _store(state: _Softmax, outputs: jax.Array, token: jax.Array, size: int) -> jax.Array:
    kv_heads, _, dim = state.total.shape
    denominator = jnp.where(state.denominator > 0, state.denominator, 1.0)
    result = (state.total / denominator[..., None]).astype(outputs.dtype)
    by_token = result.reshape(kv_heads, size, -1, dim).transpose(1, 0, 2, 3).reshape(size, -1, dim)
    return lax.dynamic_update_slice_in_dim(outputs, by_token, token, axis=0)
