"""The softmax over one tile of keys, and what joins several tiles.

The online form is that of Milakov & Gimelshein (arXiv 1805.02867): a running maximum, denominator and weighted sum.

Owns: scores to weights, in float32. Must never: know where keys come from.

Axis letters: R rows of scores (query heads), T keys of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.pages import LANES, AttentionShape

MASKED = -1e30
"""Score of a key that is not seen; finite, so that differences of two of them are not NaN."""


SUBLANES = 8

SUMMED_BY_PRODUCT_TOKENS = 256
"""Up to this many keys the sum of weights is a product with ones: the matrix unit adds along lanes sooner than the unit
that is made for it, and leaves the sum in every lane."""


class Weights(NamedTuple):
    """Of one tile: weights f32[R, T], and the maximum they are relative to, f32[R, 128], the same in each lane."""

    weights: jax.Array
    maximum: jax.Array


def across(per_row: jax.Array, lanes: int) -> jax.Array:
    """[R, 128] that are the same in every lane as [R, lanes]."""
    copies = -(-lanes // LANES)
    return jnp.concatenate([per_row] * copies, axis=1)[:, :lanes] if lanes != LANES else per_row


def product_precision(dtype: jnp.dtype) -> lax.Precision:
    """Products of float32 are not rounded to bfloat16."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def scores(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Products of queries [R, D] with keys [T, D], f32[R, T]."""
    return lax.dot_general(
        queries,
        keys,
        (((1,), (1,)), ((), ())),
        precision=product_precision(keys.dtype),
        preferred_element_type=jnp.float32,
    )


def weighted_sum(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Weights f32[R, T], rounded to the values' dtype, times values [T, D]: f32[R, D]."""
    return lax.dot_general(
        weights.astype(values.dtype),
        values,
        (((1,), (0,)), ((), ())),
        precision=product_precision(values.dtype),
        preferred_element_type=jnp.float32,
    )


def scaled(shape: AttentionShape, products: jax.Array) -> jax.Array:
    """Scores: scaled, and capped where the shape says so."""
    scaled_products = products * shape.scale
    if shape.soft_cap is None:
        return scaled_products
    return shape.soft_cap * jnp.tanh(scaled_products * (1.0 / shape.soft_cap))


def weigh(scaled_scores: jax.Array, live: jax.Array | None, sinks: jax.Array | None) -> Weights:
    """Exponentials of the scores of a tile that holds all keys of its rows.

    Args:
        scaled_scores: f32[R, T].
        live: bool[1, T] or [R, T], which keys are seen; ``None``: all of them.
        sinks: f32[R, 128], a score of each row whose value is zero, the same in each lane; ``None``: without.
    """
    rows, tokens = scaled_scores.shape
    if live is not None:
        scaled_scores = jnp.where(live, scaled_scores, MASKED)
    maximum = jnp.broadcast_to(jnp.max(scaled_scores, axis=1, keepdims=True), (rows, LANES))
    if sinks is not None:
        maximum = jnp.maximum(maximum, sinks)
    return Weights(jnp.exp(scaled_scores - across(maximum, tokens)), maximum)


def totals(tiles: Sequence[Weights], sinks: Sequence[jax.Array | None], dtype: jnp.dtype) -> list[jax.Array]:
    """Sums of weights, f32[R, 128] for each tile, the same in each lane.

    Args:
        tiles: weights of several products over the same number of keys.
        sinks: as for ``weigh``, of each.
        dtype: that the weights are rounded to before they meet the values.
    """
    rows, tokens = tiles[0].weights.shape
    if tokens > SUMMED_BY_PRODUCT_TOKENS:
        sums = [jnp.broadcast_to(jnp.sum(t.weights, axis=1, keepdims=True), (rows, LANES)) for t in tiles]
    elif rows % SUBLANES:
        sums = [weighted_sum(t.weights, jnp.ones((tokens, LANES), dtype)) for t in tiles]
    else:
        all_rows = weighted_sum(jnp.concatenate([t.weights for t in tiles], axis=0), jnp.ones((tokens, LANES), dtype))
        sums = [all_rows[i * rows : (i + 1) * rows] for i in range(len(tiles))]
    return [
        total if sink is None else total + jnp.exp(sink - tile.maximum)
        for total, sink, tile in zip(sums, sinks, tiles, strict=True)
    ]
