"""Log-probabilities under the model's own distribution: log-softmax of the raw logits.

Owns: the chosen token's logprob and the most likely tokens with theirs, for drawn tokens and, a few tokens at a time,
for prompts (their logits never exist for a whole prompt, or even a whole chunk). Must never: see shaped logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hkv_jax.array_types import Hidden, Logits
from hkv_jax.model.vocabulary import log_sum_exp, top_k
from hkv_jax.sampling_params import MAX_LOGPROBS

PROMPT_TILE_TOKENS = 16


class TopLogprobs(NamedTuple):
    """chosen f32[X], ids i32[X, 20], logprobs f32[X, 20], most likely first; X rows or tokens."""

    chosen: jax.Array
    ids: jax.Array
    logprobs: jax.Array


def none_of(count: int) -> TopLogprobs:
    """Zeros for ``count`` tokens whose logprobs nobody asked for."""
    shape = (count, MAX_LOGPROBS)
    return TopLogprobs(jnp.zeros(count), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))


def top_logprobs(logits: Logits, chosen: jax.Array) -> TopLogprobs:
    """Logprobs of tokens ``chosen`` i32[S], and of the 20 most likely, from raw logits f32[S, V]."""
    norm = log_sum_exp(logits)
    best, ids = top_k(logits, MAX_LOGPROBS)
    safe = jnp.maximum(chosen, 0)[:, None]
    return TopLogprobs(jnp.take_along_axis(logits, safe, axis=1)[:, 0] - norm, ids, best - norm[:, None])


def prompt_logprobs(
    hidden: Hidden, targets: jax.Array, num_tokens: jax.Array, of_tile: Callable[[Hidden, jax.Array], TopLogprobs]
) -> TopLogprobs:
    """Logprobs of each token's successor ``targets`` i32[T], a tile of tokens at a time.

    Args:
        hidden: [T, E], before the final norm.
        targets: the token that follows; negative where none is wanted (unspecified result).
        num_tokens: live tokens of the step, a scalar; later tiles are not computed.
        of_tile: the logprobs of a few tokens, from their hidden states [n, E] and their successors i32[n].
    """
    tile, count = PROMPT_TILE_TOKENS, hidden.shape[0]
    spare = -count % tile
    hidden, targets = jnp.pad(hidden, ((0, spare), (0, 0))), jnp.pad(targets, (0, spare))

    def one_tile(number: jax.Array, found: TopLogprobs) -> TopLogprobs:
        start = number * tile
        part = of_tile(*(lax.dynamic_slice_in_dim(x, start, tile) for x in (hidden, targets)))
        return TopLogprobs(
            *(lax.dynamic_update_slice_in_dim(a, b, start, axis=0) for a, b in zip(found, part, strict=True))
        )

    found = lax.fori_loop(0, -(-num_tokens // tile), one_tile, none_of(count + spare))
    return TopLogprobs(*(part[:count] for part in found))
