"""Draws the next token of every row on the device.

Owns: the meaning of each sampling field on logits, in the order bias, penalties, min_tokens, temperature, min-p, top-k,
top-p, draw. A draw is the inverse of the cumulative distribution, in vocabulary order, at one uniform number that is a
function of (seed, sample, output position) alone. What top-k and top-p keep is a *cut*: a smallest logit and, among
logits equal to it, a largest id. It is found from the 64 most likely tokens where they suffice, else by bisection over
the ordered bits of float32; both are exact, and each row uses the one its own numbers call for, so that a row's token
never depends on the others. Must never: sort or sample over the vocabulary (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hkv_jax.array_types import Logits
from hkv_jax.model.vocabulary import argmax, invert_cumulative, plain_zeros, top_k

NUM_CANDIDATES = 64

SMALLEST_DIVISOR = 1e-30
"""Smaller temperatures and repetition penalties count as this, by which a logit divided is still finite."""


class LaneSampling(NamedTuple):
    """State of each row's lane that shapes its logits, gathered by row.

    counts i32[S, V]: output tokens so far. in_prompt bool[S, V]. bias_ids i32[S, B] (past the vocabulary: none),
    bias_values f32[S, B]. stop_ids i32[S, C] (past the vocabulary: none).
    """

    counts: jax.Array
    in_prompt: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    stop_ids: jax.Array


class SamplingRows(NamedTuple):
    """Sampling fields of each row, [S] each (seeds i32[S, 2]); meanings as in ``SamplingParams`` and ``StepFields``."""

    seeds: jax.Array
    samples: jax.Array
    output_positions: jax.Array
    suppress_stops: jax.Array
    top_k: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array


class _Cut(NamedTuple):
    """What is kept of a row: logits above ``value``, and those equal to it with an id up to ``last_id``."""

    value: jax.Array
    last_id: jax.Array


def shape_logits(logits: Logits, rows: SamplingRows, lanes: LaneSampling) -> Logits:
    """Applies bias, penalties and the mask of stop ids below min_tokens."""
    index = jnp.arange(logits.shape[0])[:, None]
    shaped = logits.at[index, lanes.bias_ids].add(lanes.bias_values, mode="drop")
    repeated = (lanes.counts > 0) | lanes.in_prompt
    # Bounded, so that no logit becomes infinite.
    factor = jnp.maximum(rows.repetition_penalty, SMALLEST_DIVISOR)[:, None]
    shaped = jnp.where(repeated, jnp.where(shaped > 0, shaped / factor, shaped * factor), shaped)
    shaped = shaped - rows.frequency_penalty[:, None] * lanes.counts
    shaped = shaped - rows.presence_penalty[:, None] * (lanes.counts > 0)
    stops = jnp.where(rows.suppress_stops[:, None] > 0, lanes.stop_ids, logits.shape[1])
    return shaped.at[index, stops].set(-jnp.inf, mode="drop")


def sample(logits: Logits, rows: SamplingRows) -> jax.Array:
    """The token of each row from its shaped logits: i32[S]."""
    greedy = argmax(logits)
    drawn = lax.cond(jnp.any(rows.temperature > 0), _draw, lambda *_: greedy, logits, rows)
    return jnp.where(rows.temperature > 0, drawn, greedy)


def uniform(rows: SamplingRows) -> jax.Array:
    """The number in [0, 1) that decides each row's draw: f32[S]."""

    def one(words: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(words.astype(jnp.uint32), impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, sample), position))

    return jax.vmap(one)(rows.seeds, rows.samples, rows.output_positions)


def draw_weights(logits: Logits, rows: SamplingRows) -> jax.Array:
    """What each row draws by: f32[S, V], probabilities up to a factor a row, 0 for a token that is not kept."""
    scaled = logits / jnp.maximum(rows.temperature, SMALLEST_DIVISOR)[:, None]
    largest = jnp.max(scaled, axis=-1, keepdims=True)
    # min-p 0 gives −inf: nothing is dropped.
    scaled = jnp.where(scaled < largest + jnp.log(rows.min_p)[:, None], -jnp.inf, scaled)
    cut = _cut(scaled, rows)
    ids = jnp.arange(scaled.shape[1], dtype=jnp.int32)[None]
    value, last_id = cut.value[:, None], cut.last_id[:, None]
    kept = (scaled > value) | ((scaled == value) & (ids <= last_id))
    return jnp.where(kept, jnp.exp(scaled - largest), 0.0)


def _draw(logits: Logits, rows: SamplingRows) -> jax.Array:
    return invert_cumulative(draw_weights(logits, rows), uniform(rows))


def _cut(scaled: jax.Array, rows: SamplingRows) -> _Cut:
    """Finds each row's cut; rows with neither top-k nor top-p keep everything."""
    size = scaled.shape[1]
    everything = _Cut(jnp.full(scaled.shape[0], -jnp.inf), jnp.full(scaled.shape[0], size, jnp.int32))
    limited = (rows.temperature > 0) & (((rows.top_k > 0) & (rows.top_k < size)) | (rows.top_p < 1))
    near, enough = lax.cond(
        jnp.any(limited), _cut_among_candidates, lambda *_: (everything, jnp.ones(scaled.shape[0], bool)), scaled, rows
    )
    far = limited & ~enough
    wide = lax.cond(jnp.any(far), _cut_by_bisection, lambda *_: everything, scaled, rows)
    return _Cut(*(jnp.where(limited, jnp.where(far, w, n), e) for w, n, e in zip(wide, near, everything, strict=True)))


def _cut_among_candidates(scaled: jax.Array, rows: SamplingRows) -> tuple[_Cut, jax.Array]:
    """The cut from the most likely tokens, and which rows it is right for."""
    count = min(NUM_CANDIDATES, scaled.shape[1])
    values, ids = top_k(scaled, count)
    largest = values[:, :1]
    mass = jnp.where(values > -jnp.inf, jnp.exp(values - largest), 0.0)
    rank = jnp.arange(count, dtype=jnp.int32)[None]
    by_count = jnp.where(rows.top_k > 0, rows.top_k, scaled.shape[1])[:, None]
    mass = jnp.where(rank < by_count, mass, 0.0)
    everything = jnp.sum(jnp.exp(scaled - largest), axis=-1, keepdims=True)
    total = jnp.where(by_count <= count, jnp.sum(mass, axis=-1, keepdims=True), everything)
    running = jnp.cumsum(mass, axis=-1)
    reached = running >= rows.top_p[:, None] * total
    # The first token at which the mass is reached; without top-p the last one that top-k keeps.
    last_by_mass = jnp.where(jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1).astype(jnp.int32), count - 1)
    last_by_count = jnp.minimum(by_count[:, 0], count) - 1
    last = jnp.where(rows.top_p < 1, jnp.minimum(last_by_mass, last_by_count), last_by_count)
    enough = (by_count[:, 0] <= count) | ((rows.top_k == 0) & (rows.top_p < 1) & jnp.any(reached, axis=-1))
    take = lambda x: jnp.take_along_axis(x, last[:, None], axis=1)[:, 0]  # noqa: E731
    return _Cut(take(values), take(ids)), enough | (count == scaled.shape[1])


def _cut_by_bisection(scaled: jax.Array, rows: SamplingRows) -> _Cut:
    """The cut by bisection: first the k-th largest, then the least value at which the mass is reached."""
    size = scaled.shape[1]
    bits = _ordered_bits(scaled)
    wanted = jnp.where((rows.top_k > 0) & (rows.top_k < size), rows.top_k, size)
    largest = jnp.max(scaled, axis=-1, keepdims=True)
    mass = jnp.where(scaled > -jnp.inf, jnp.exp(scaled - largest), 0.0)
    by_count = _last_kept(bits, jnp.ones_like(scaled), wanted.astype(jnp.float32))
    mass = jnp.where(_keeps(bits, by_count), mass, 0.0)
    total = jnp.sum(mass, axis=-1)
    # The most likely token has mass 1 and is always kept, also where top-p is 0 in float32.
    by_mass = _last_kept(bits, mass, jnp.maximum(rows.top_p * total, 1.0))
    value_bits, last_id = (jnp.where(rows.top_p < 1, m, c) for m, c in zip(by_mass, by_count, strict=True))
    found = jnp.where(bits == value_bits[:, None], scaled, -jnp.inf)
    return _Cut(jnp.max(found, axis=-1), last_id)


def _last_kept(bits: jax.Array, weights: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least ordered bits, and id among equals, at which the weight of what is kept reaches ``wanted``."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        # The middle without overflow; rounds up, so that low moves.
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        enough = jnp.sum(jnp.where(bits >= middle[:, None], weights, 0.0), axis=-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    limits = jnp.iinfo(jnp.int32)
    rows = jnp.zeros(bits.shape[0], jnp.int32)
    value, _ = lax.fori_loop(0, 32, halve, (rows + limits.min, rows + limits.max))
    above = jnp.sum(jnp.where(bits > value[:, None], weights, 0.0), axis=-1)
    running = above[:, None] + jnp.cumsum(jnp.where(bits == value[:, None], weights, 0.0), axis=-1)
    among_equals = (bits == value[:, None]) & (weights > 0)
    reached = among_equals & (running >= wanted[:, None])
    # The two sums round differently: where this one falls short, the last that has a weight is meant.
    ids = jnp.arange(bits.shape[1], dtype=jnp.int32)
    last_with_weight = jnp.max(jnp.where(among_equals, ids, 0), axis=-1)
    return value, jnp.where(jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1).astype(jnp.int32), last_with_weight)


def _keeps(bits: jax.Array, cut: tuple[jax.Array, jax.Array]) -> jax.Array:
    value, last_id = cut[0][:, None], cut[1][:, None]
    ids = jnp.arange(bits.shape[1], dtype=jnp.int32)[None]
    return (bits > value) | ((bits == value) & (ids <= last_id))


def _ordered_bits(values: jax.Array) -> jax.Array:
    """int32 in the order of the floats: negative ones have their magnitude bits flipped."""
    bits = lax.bitcast_convert_type(plain_zeros(values), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
