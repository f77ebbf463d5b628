"""int8 keys and values: one scale a token and kv head, kept beside the pages and applied beside the products.

A second array has one 32-bit word for each row of 128 lanes of the pool, in the order of the rows: page p of a group is
rows ``p · R`` to ``p · R + R - 1`` of 128 words, plane by plane, P words a plane. The word of a K or V plane is a
float32; that of a plane which K and V share is two bfloat16, K in the lower half. Scores are products with the
integers times the keys' scales, and weights are multiplied by the values' scales before they meet the integers: both
need scales along lanes, where they lie, and no key or value is ever scaled one by one.

Owns: that layout, quantisation, and the scales of a tile inside a kernel. Must never: know which page belongs to whom.

Axis letters: T tokens, K kv heads, D head dim, C planes, P token slots of a block, R rows of words of a page, N keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.heads import HeadLayout
from pallas_kernels.pages import LANES, PageGeometry, as_pages

MOST = 127.0
"""The integer of a row's largest element; -128 is not used, so that the sign changes nothing."""

BFLOAT16_BITS = 16
BFLOAT16_EXPONENT, BFLOAT16_MANTISSA = 8, 7


class ScaledArena(NamedTuple):
    """A pool of int8 on one chip: values [1, rows, 128], and words i32[1, rows / 128, 128]."""

    values: jax.Array
    words: jax.Array


Arena = jax.Array | ScaledArena
"""A pool on one chip; of int8 it has scales."""


class NewKV(NamedTuple):
    """Keys and values [T, K, D] of a step in the dtype of the pool, and of int8 their words i32[T, C], else None."""

    keys: jax.Array
    values: jax.Array
    words: jax.Array | None = None


def is_scaled(kv_dtype: jnp.dtype) -> bool:
    """Whether K/V of this dtype have scales."""
    return jnp.dtype(kv_dtype) == jnp.int8


def values_of(arena: Arena) -> jax.Array:
    """The array that has the K/V."""
    return arena.values if isinstance(arena, ScaledArena) else arena


def pool_views(arena: Arena, pages: PageGeometry) -> list[jax.Array]:
    """Pages [num_pages, C, P, 128], and where they have scales the words [num_pages, R, 128]; bitcasts."""
    views = [as_pages(values_of(arena), pages)]
    if isinstance(arena, ScaledArena):
        views.append(arena.words.reshape(-1, word_rows(pages), LANES))
    return views


def arena_of(views: Sequence[jax.Array], arena: Arena) -> Arena:
    """The views of a pool as the arena they are of."""
    if isinstance(arena, ScaledArena):
        return ScaledArena(*(view.reshape(part.shape) for view, part in zip(views, arena, strict=True)))
    return views[0].reshape(arena.shape)


def word_rows(pages: PageGeometry) -> int:
    """R.

    Raises:
        ValueError: the words of a page are not whole rows.
    """
    if pages.rows % LANES:
        raise ValueError(
            f"a page of {pages.num_planes} planes of {pages.block_size} tokens has {pages.rows} scales, not whole rows "
            f"of {LANES}; int8 needs larger blocks"
        )
    return pages.rows // LANES


def check_dtype(name: str, new: jax.Array, arena: Arena, words: jax.Array | None) -> None:
    """Checks that new keys or values are what the pool holds, and that integers come with their scales.

    Raises:
        ValueError: they are not; the message names ``name``, both dtypes and what would do.
    """
    pool = values_of(arena)
    if new.dtype != pool.dtype:
        raise ValueError(f"{name} are {new.dtype}, the pool {pool.dtype}; round them to the pool's dtype")
    if is_scaled(pool.dtype) and (words is None or not isinstance(arena, ScaledArena)):
        raise ValueError(f"{name} are {new.dtype}: words of the new tokens and of the pool (ScaledArena) are needed")


# ---------------------------------------------------------------------- new tokens


def quantise(keys: jax.Array, values: jax.Array, pages: PageGeometry) -> NewKV:
    """Rounds keys [T, K, Dk] and values [T, K, Dv] to integers, symmetric for each token and head.

    The largest magnitude becomes 127; a row of zeros has scale 0. An element is off by at most half a scale, that is
    0.4 % of the largest one.
    """
    parts = [_quantised(part.astype(jnp.float32), pages.shares_plane) for part in (keys, values)]
    (key_ints, key_scales), (value_ints, value_scales) = parts
    return NewKV(key_ints, value_ints, _words(key_scales, value_scales, pages))


def _quantised(part: jax.Array, short: bool) -> tuple[jax.Array, jax.Array]:
    """int8[T, K, D] and scales f32[T, K]; ``short``: the scales are exact as bfloat16."""
    scales = jnp.max(jnp.abs(part), axis=-1) / MOST
    if short:
        scales = lax.reduce_precision(scales, BFLOAT16_EXPONENT, BFLOAT16_MANTISSA)
    divisors = jnp.where(scales == 0, 1.0, scales)[..., None]
    # A short scale is off by 2^-9 of itself, so no quotient is more than 127.3.
    return jnp.round(part / divisors).astype(jnp.int8), scales


def _words(key_scales: jax.Array, value_scales: jax.Array, pages: PageGeometry) -> jax.Array:
    """Words i32[T, C] of scales f32[T, K]; a head of several planes repeats its word."""
    keys, values = (lax.bitcast_convert_type(scales, jnp.int32) for scales in (key_scales, value_scales))
    if pages.shares_plane:
        return lax.shift_right_logical(keys, BFLOAT16_BITS) | values
    by_head = [jnp.repeat(keys[..., None], pages.key_planes, -1), jnp.repeat(values[..., None], pages.value_planes, -1)]
    return jnp.concatenate(by_head, axis=-1).reshape(keys.shape[0], pages.num_planes)


def in_every_slot(words: jax.Array, pages: PageGeometry) -> jax.Array:
    """Words [T, C] of tokens as pages [T, R, 128] whose slots all have the same."""
    return jnp.repeat(words, pages.block_size, axis=1).reshape(-1, word_rows(pages), LANES)


def head_scales(words: jax.Array, pages: PageGeometry) -> tuple[jax.Array, jax.Array]:
    """Scales of keys and of values, f32[..., K], from words [..., C]."""
    by_head = words.reshape(*words.shape[:-1], pages.num_kv_heads, pages.planes_per_head)
    value_plane = 0 if pages.shares_plane else pages.key_planes
    return key_scale(by_head[..., 0], pages), value_scale(by_head[..., value_plane], pages)


def key_scale(words: jax.Array, pages: PageGeometry) -> jax.Array:
    """The scale in a word of a head's first plane."""
    return _as_float(lax.shift_left(words, BFLOAT16_BITS) if pages.shares_plane else words)


def value_scale(words: jax.Array, pages: PageGeometry) -> jax.Array:
    """The scale in a word of the plane where a head's value begins."""
    return _as_float(words & ~((1 << BFLOAT16_BITS) - 1) if pages.shares_plane else words)


def _as_float(words: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(words, jnp.float32)


# ---------------------------------------------------------------------- inside a kernel


def buffer_rows(pages: PageGeometry, num_blocks: int) -> int:
    """Rows of 128 words that hold those of so many blocks, in whole turns of ``TileScales``."""
    together = max(1, LANES // pages.block_size)
    return -(-num_blocks // together) * together * word_rows(pages)


def slot_of_word(pages: PageGeometry) -> jax.Array:
    """i32[R, 128]: which slot of its block each word of a page belongs to."""
    shape = (word_rows(pages), LANES)
    lanes = lax.broadcasted_iota(jnp.int32, shape, 0) * LANES + lax.broadcasted_iota(jnp.int32, shape, 1)
    return lanes & (pages.block_size - 1)


def in_word_rows(planes: Sequence[jax.Array], pages: PageGeometry) -> jax.Array:
    """Words i32[1, at least P] of each plane's slots as they lie in a page, [R, 128]."""
    block = pages.block_size
    if block >= LANES:
        parts = [plane[:, begin : begin + LANES] for plane in planes for begin in range(0, block, LANES)]
        return jnp.concatenate(parts, axis=0)
    together = LANES // block
    rows = [jnp.concatenate([one[:, :LANES] for one in planes[k::together]], axis=0) for k in range(together)]
    stretch = lax.broadcasted_iota(jnp.int32, rows[0].shape, 1) // block
    page = rows[0]
    for k in range(1, together):
        page = jnp.where(stretch == k, pltpu.roll(rows[k], k * block, 1), page)
    return page


class NoScales:
    """Of K/V that are what they are."""

    def of_scores(self, product: int, scores: jax.Array) -> jax.Array:
        """Scores f32[rows, N] of a product, scaled as its keys are."""
        return scores

    def of_weights(self, product: int, weights: jax.Array, live: jax.Array | None) -> jax.Array:
        """Weights f32[rows, N] of a product, scaled as its values are; 0 where ``live`` bool[1, N] says so."""
        return weights


@dataclasses.dataclass(frozen=True)
class TileScales(NoScales):
    """Of the keys of a tile.

    Attributes:
        heads: the order of rows.
        planes: for each plane its words along lanes, i32[chunks, 128]; several where a block has several chunks, which
            then alternate.
    """

    heads: HeadLayout
    planes: list[list[jax.Array]]

    def of_scores(self, product: int, scores: jax.Array) -> jax.Array:
        """As ``NoScales`` says."""
        pages = self.heads.shape.pages
        return self._times(product, scores, pages.first_key_plane, key_scale, None)

    def of_weights(self, product: int, weights: jax.Array, live: jax.Array | None) -> jax.Array:
        """As ``NoScales`` says; words of slots that nobody wrote may be NaN."""
        pages = self.heads.shape.pages
        return self._times(product, weights, pages.first_value_plane, value_scale, live)

    def _times(
        self,
        product: int,
        rows: jax.Array,
        first_plane: Callable[[int], int],
        as_scale: Callable[[jax.Array, PageGeometry], jax.Array],
        live: jax.Array | None,
    ) -> jax.Array:
        heads, pages = self.heads, self.heads.shape.pages
        mine = range(product * heads.heads_per_product, (product + 1) * heads.heads_per_product)
        scales = [[as_scale(words, pages) for words in self.planes[first_plane(head)]] for head in mine]
        parts = []
        for begin in range(0, rows.shape[1], LANES):
            part = rows[:, begin : begin + LANES]
            index, which = divmod(begin // LANES, len(scales[0]))
            of_heads = [one[which][index : index + 1, : part.shape[1]] for one in scales]
            if live is not None:
                of_heads = [jnp.where(live[:, begin : begin + LANES], one, 0.0) for one in of_heads]
            parts.append(part * heads.by_row(of_heads, part.shape[0]))
        return jnp.concatenate(parts, axis=1)


def tile_scales(heads: HeadLayout, words_ref: Any, num_blocks: int) -> TileScales:
    """Scales of a tile of ``num_blocks`` blocks, whose words i32[``buffer_rows``, 128] lie block after block."""
    return TileScales(heads, words_along_lanes(heads.shape.pages, words_ref, num_blocks))


def words_along_lanes(pages: PageGeometry, words_ref: Any, num_blocks: int) -> list[list[jax.Array]]:
    """Words of ``num_blocks`` blocks, i32[``buffer_rows``, 128] block after block, as ``TileScales.planes``."""
    rows, block = word_rows(pages), pages.block_size
    together = max(1, LANES // block)
    turns = -(-num_blocks // together)

    def every(first: int) -> jax.Array:
        if turns == 1:
            return words_ref[first : first + 1, :]
        return words_ref[pl.ds(first, turns, stride=together * rows), :]

    if block >= LANES:
        chunks = block // LANES
        return [[every(plane * chunks + i) for i in range(chunks)] for plane in range(pages.num_planes)]
    planes: list[list[jax.Array]] = []
    for row in range(rows):
        of_blocks = [every(position * rows + row) for position in range(together)]
        planes += [[words] for words in _exchanged(of_blocks, block)]
    return planes


def _exchanged(vectors: list[jax.Array], width: int) -> list[jax.Array]:
    """Stretches of ``width`` lanes: stretch i of vector k from stretch k of vector i; as many vectors as stretches.

    A transposition by halves: what differs in one bit of both indices changes places, one bit after the other.
    """
    distance = 1
    vectors = list(vectors)
    stretch = lax.broadcasted_iota(jnp.int32, vectors[0].shape, 1) // width
    while distance < len(vectors):
        is_low = (stretch & distance) == 0
        for i in range(len(vectors)):
            if i & distance:
                continue
            low, high = vectors[i], vectors[i + distance]
            shift = distance * width
            vectors[i] = jnp.where(is_low, low, pltpu.roll(high, shift, 1))
            vectors[i + distance] = jnp.where(is_low, pltpu.roll(low, LANES - shift, 1), high)
        distance *= 2
    return vectors
