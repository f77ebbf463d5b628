"""The scales of a stretch's keys, where K/V are integers: fetched beside them, laid along lanes, applied to scores.

A stretch is blocks of the pool, whose words lie as in pages, then the step's own tokens, whose words lie along lanes
from any lane on: they are turned to where the pool's end.

Owns: the words of a stretch and what comes of them. Must never: know masks, or which block belongs to whom.

Axis letters: as in ``tile``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pages import LANES, PageGeometry
from pallas_kernels.prefill_attention.refs import Stretch
from pallas_kernels.prefill_attention.tile import PrefillTile
from pallas_kernels.scales import buffer_rows, key_scale, value_scale, word_rows, words_along_lanes


class ScaleRefs(NamedTuple):
    """In HBM: pool i32[num_pages, R, 128] and own i32[head groups, planes, T'] (windowed, else None).

    VMEM: pool_words i32[2, rows, 128], own_words i32[2, planes, lanes] or None, scales f32[2 · heads, held / 128, 128],
    those of keys first. fetched: semaphores of the two places, those of the keys.
    """

    pool: Any
    own: Any
    pool_words: Any
    own_words: Any
    scales: Any
    fetched: Any


@dataclasses.dataclass(frozen=True)
class ScalePlan:
    """Sizes of what is fetched for a stretch; of one group of heads."""

    tile: PrefillTile

    @property
    def pages(self) -> PageGeometry:
        """A page as if the group's heads were all."""
        return dataclasses.replace(self.tile.shape.pages, num_kv_heads=self.tile.heads)

    @property
    def pool_rows(self) -> int:
        """Rows of 128 words of a stretch of blocks."""
        return buffer_rows(self.pages, self.tile.held_keys // self.tile.block)

    @property
    def own_tokens(self) -> int:
        """T', the step's tokens in whole vectors."""
        return -(-self.tile.num_tokens // LANES) * LANES

    @property
    def own_lanes(self) -> int:
        """Words of own tokens fetched at once, from a whole vector on."""
        return min(self.own_tokens, -(-self.tile.held_keys // LANES) * LANES + LANES)

    def first_own(self, stretch: Stretch) -> Any:
        """The first token of those words."""
        aligned = lax.div(stretch.own_token, LANES) * LANES
        return pl.multiple_of(jnp.minimum(aligned, self.own_tokens - self.own_lanes), LANES)

    def own_by_group(self, words: jax.Array) -> jax.Array:
        """Words [T, C] of the step's tokens as the kernel takes them, [head groups, planes, T']."""
        padded = jnp.pad(words, ((0, self.own_tokens - words.shape[0]), (0, 0)))
        return padded.T.reshape(self.tile.head_groups, self.tile.planes, -1)

    def scratch(self) -> list[Any]:
        """In the order of ``ScaleRefs``."""
        tile = self.tile
        own = [pltpu.VMEM((2, tile.planes, self.own_lanes), jnp.int32)] if tile.reads_own else []
        scales = pltpu.VMEM((2 * tile.heads, tile.held_keys // LANES, LANES), jnp.float32)
        return [pltpu.VMEM((2, self.pool_rows, LANES), jnp.int32), *own, scales]


class NoStretchScales:
    """Of K/V that are what they are."""

    def block_copies(self, page: Any, group: Any, number: Any, place: Any) -> list[Any]:
        """What a block brings besides its keys."""
        return []

    def own_copies(self, group: Any, stretch: Stretch, place: Any) -> list[Any]:
        """What the own tokens of a stretch bring besides their keys."""
        return []

    def prepare(self, stretch: Stretch, place: Any) -> None:
        """Makes scales of what arrived."""

    def clear(self, number: Any, is_key: jax.Array) -> None:
        """Zeroes the scales of a tile's lanes that are no keys; ``is_key`` bool[1, N]."""

    def of_keys(self, head: int, number: Any, scores: jax.Array) -> jax.Array:
        """Scores f32[R, N] of a tile, by its number in the stretch, scaled as its keys are."""
        return scores

    def of_values(self, head: int, number: Any, weights: jax.Array) -> jax.Array:
        """Weights f32[R, N] of a tile, scaled as its values are."""
        return weights


class StretchScales(NoStretchScales):
    """Of integers."""

    def __init__(self, tile: PrefillTile, refs: ScaleRefs) -> None:
        self._plan, self._refs = ScalePlan(tile), refs

    def block_copies(self, page: Any, group: Any, number: Any, place: Any) -> list[Any]:
        """As ``NoStretchScales`` says."""
        rows = word_rows(self._plan.pages)
        there = self._refs.pool.at[page, pl.ds(group * rows, rows)]
        here = self._refs.pool_words.at[place, pl.ds(number * rows, rows)]
        return [pltpu.make_async_copy(there, here, self._refs.fetched.at[place])]

    def own_copies(self, group: Any, stretch: Stretch, place: Any) -> list[Any]:
        """As ``NoStretchScales`` says."""
        there = self._refs.own.at[group, :, pl.ds(self._plan.first_own(stretch), self._plan.own_lanes)]
        return [pltpu.make_async_copy(there, self._refs.own_words.at[place], self._refs.fetched.at[place])]

    def prepare(self, stretch: Stretch, place: Any) -> None:
        """As ``NoStretchScales`` says."""
        tile, pages = self._plan.tile, self._plan.pages
        held_blocks = tile.held_keys // tile.block
        planes = words_along_lanes(pages, self._refs.pool_words.at[place], held_blocks)
        own = self._own_along_lanes(stretch, place) if tile.reads_own else None
        pool_keys = stretch.num_blocks * tile.block
        for head in range(tile.heads):
            parts: tuple[tuple[int, Callable[..., jax.Array]], ...] = (
                (pages.first_key_plane(head), key_scale),
                (pages.first_value_plane(head), value_scale),
            )
            for kind, (plane, as_scale) in enumerate(parts):
                step = len(planes[plane])
                for first, words in enumerate(planes[plane]):
                    chunks = pl.ds(first, words.shape[0], stride=step) if step > 1 else pl.ds(0, words.shape[0])
                    if own is not None:
                        chunk = first + step * lax.broadcasted_iota(jnp.int32, words.shape, 0)
                        key = chunk * LANES + lax.broadcasted_iota(jnp.int32, words.shape, 1)
                        words = jnp.where(key < pool_keys, words, own[plane][first::step])
                    self._refs.scales[kind * tile.heads + head, chunks, :] = as_scale(words, pages)

    def _own_along_lanes(self, stretch: Stretch, place: Any) -> list[jax.Array]:
        """For each plane, words of own tokens where the stretch has them, i32[held / 128, 128]."""
        plan, tile = self._plan, self._plan.tile
        lanes = max(plan.own_lanes, tile.held_keys)
        words = self._refs.own_words[place]
        if lanes > plan.own_lanes:
            missing = jnp.zeros((tile.planes, lanes - plan.own_lanes), jnp.int32)
            words = jnp.concatenate([words, missing], axis=1)
        shift = stretch.num_blocks * tile.block - (stretch.own_token - plan.first_own(stretch))
        turned = pltpu.roll(words, lax.rem(shift + lanes, lanes), 1)
        return [
            jnp.concatenate(
                [turned[plane : plane + 1, begin : begin + LANES] for begin in range(0, tile.held_keys, LANES)], axis=0
            )
            for plane in range(tile.planes)
        ]

    def clear(self, number: Any, is_key: jax.Array) -> None:
        """As ``NoStretchScales`` says."""
        parts = self._plan.tile.keys // LANES
        for row in range(2 * self._plan.tile.heads):
            for i in range(parts):
                here = self._refs.scales.at[row, pl.ds(number * parts + i, 1), :]
                here[...] = jnp.where(is_key[:, i * LANES : (i + 1) * LANES], here[...], 0.0)

    def of_keys(self, head: int, number: Any, scores: jax.Array) -> jax.Array:
        """As ``NoStretchScales`` says."""
        return self._times(head, number, scores)

    def of_values(self, head: int, number: Any, weights: jax.Array) -> jax.Array:
        """As ``NoStretchScales`` says."""
        return self._times(self._plan.tile.heads + head, number, weights)

    def _times(self, row: int, number: Any, columns: jax.Array) -> jax.Array:
        parts = self._plan.tile.keys // LANES
        scaled = [
            columns[:, i * LANES : (i + 1) * LANES] * self._refs.scales[row, pl.ds(number * parts + i, 1), :]
            for i in range(parts)
        ]
        return jnp.concatenate(scaled, axis=1)
