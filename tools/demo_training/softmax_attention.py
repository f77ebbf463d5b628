"""Masked softmax attention with its own gradient: what makes training fast enough on one CPU core.

Owns: the forward and backward formulas. The backward pass keeps the unnormalised weights and uses
sum_k dp_k p_k = do · o (Dao et al., arXiv 2205.14135, section 3.1), so that it goes over the scores half as often as
the one that jax derives. Must never: know of windows or heads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """q [B, Q, D], k and v [B, K, D], seen bool broadcast to [B, Q, K] → [B, Q, D]. Each query must see a key."""
    return _forward(queries, keys, values, seen)[0]


def _forward(queries: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> tuple[jax.Array, _Residuals]:
    scores = jnp.where(seen, jnp.einsum("bqd,bkd->bqk", queries, keys), -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    output = jnp.einsum("bqk,bkd->bqd", weights, values) / total
    return output, (queries, keys, values, weights, total, output)


def _backward(residuals: _Residuals, gradient: jax.Array) -> tuple[Any, ...]:
    queries, keys, values, weights, total, output = residuals
    gradient = gradient / total
    shared = jnp.sum(gradient * output, axis=-1, keepdims=True)
    of_scores = weights * (jnp.einsum("bqd,bkd->bqk", gradient, values) - shared)
    return (
        jnp.einsum("bqk,bkd->bqd", of_scores, keys),
        jnp.einsum("bqk,bqd->bkd", of_scores, queries),
        jnp.einsum("bqk,bqd->bkd", weights, gradient),
        None,
    )


attend.defvjp(_forward, _backward)
