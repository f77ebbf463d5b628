"""Writes blocks of new keys and values.

A whole block whose tokens lie at a multiple of the row tile is copied plane by plane from where the step's keys and
values lie, and never seen. Others (a row's first and last block, and all of a row that begins between) pass through
VMEM: their tokens are turned into place and laid over what the block has.

Owns: the kernel body. Must never: be called but through ``ops``.

Axis letters: T tokens, C planes of a page, P token slots of a block, I items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_update.items import ITEM_FIELDS
from pallas_kernels.pages import LANES, PageGeometry, row_tile
from pallas_kernels.scales import in_word_rows, slot_of_word


@dataclasses.dataclass(frozen=True)
class UpdatePlan:
    """What is static.

    ``num_tokens`` T is at least ``window_rows``; ``dtype`` is the pool's; ``planes`` names for each plane of a page the
    array that has it and the first lane there. ``of_words``: what is written are scales, which lie along lanes.
    """

    pages: PageGeometry
    num_tokens: int
    dtype: jnp.dtype
    planes: tuple[tuple[int, int], ...]
    of_words: bool = False

    @property
    def row_tile(self) -> int:
        """Tokens that copies begin at a multiple of."""
        return LANES if self.of_words else row_tile(self.dtype)

    @property
    def window_rows(self) -> int:
        """Tokens read for one block: one tile more than its own, wherever its first token lies."""
        return -(-self.pages.block_size // self.row_tile) * self.row_tile + self.row_tile


class Item(NamedTuple):
    """A block's page, the offset in it of the first new token, that token, and how many there are."""

    page: Any
    offset: Any
    token: Any
    length: Any


def update_kernel(plan: UpdatePlan, num_arrays: int) -> Callable[..., None]:
    """The body of ``pallas_call``; refs in the order of ``ops``."""

    def body(items_ref: Any, num_items_ref: Any, layer_ref: Any, *refs: Any) -> None:
        arrays, (_aliased, pages, *scratch) = refs[:num_arrays], refs[num_arrays:]
        kind = _WordUpdate if plan.of_words else _Update
        kind(plan, (items_ref, layer_ref), arrays, (pages, *scratch)).run(num_items_ref[0])

    return body


class _Update:
    """One call."""

    def __init__(
        self, plan: UpdatePlan, scalars: tuple[Any, Any], arrays: Sequence[Any], refs: tuple[Any, ...]
    ) -> None:
        self._plan, self._arrays = plan, arrays
        self._items, self._layer = scalars
        self._pages, self._new, self._old, self._read, self._written, self._passed = refs

    def run(self, num_items: Any) -> None:
        """All items: those that pass through VMEM two at a time, one read while the other is laid over."""

        def one(number: Any, _: None) -> None:
            item = self._item(number)
            place = lax.rem(number, 2)

            @pl.when(self._is_whole(item))
            def _whole() -> None:
                for copy in self._whole_copies(item):
                    copy.start()

            @pl.when(number + 1 < num_items)
            def _ahead() -> None:
                self._read_part(self._item(number + 1), 1 - place, number + 1)

            @pl.when(jnp.logical_not(self._is_whole(item)))
            def _part() -> None:
                for copy in self._part_reads(item, place):
                    copy.wait()
                self._lay_over(item, place)
                self._part_write(item, place).start()

        @pl.when(num_items > 0)
        def _first() -> None:
            self._read_part(self._item(0), 0, 0)

        lax.fori_loop(0, num_items, one, None)

        def settle(number: Any, _: None) -> None:
            item = self._item(number)

            @pl.when(self._is_whole(item))
            def _wait() -> None:
                for copy in self._whole_copies(item):
                    copy.wait()

        lax.fori_loop(0, num_items, settle, None)
        lax.fori_loop(jnp.maximum(num_items - 2, 0), num_items, lambda number, _: self._settle_part(number), None)

    def _item(self, number: Any) -> Item:
        begin = number * ITEM_FIELDS
        return Item(*(self._items[begin + i] for i in range(ITEM_FIELDS)))

    def _is_whole(self, item: Item) -> Any:
        return (item.length == self._plan.pages.block_size) & (lax.rem(item.token, self._plan.row_tile) == 0)

    def _whole_copies(self, item: Item) -> list[Any]:
        plan = self._plan
        tokens = pl.ds(pl.multiple_of(item.token, plan.row_tile), plan.pages.block_size)
        return [
            pltpu.make_async_copy(
                self._arrays[array].at[tokens, pl.ds(lane, LANES)],
                self._pages.at[item.page + self._layer[0], plane],
                self._passed,
            )
            for plane, (array, lane) in enumerate(plan.planes)
        ]

    def _read_part(self, item: Item, place: Any, number: Any) -> None:
        """Begins to read what an item needs, once its place is free."""

        @pl.when(jnp.logical_not(self._is_whole(item)))
        def _read() -> None:
            @pl.when(number >= 2)
            def _free() -> None:
                self._settle_part(number - 2)

            for copy in self._part_reads(item, place):
                copy.start()

        @pl.when(self._is_whole(item) & (number >= 2))
        def _free_anyway() -> None:
            self._settle_part(number - 2)

    def _settle_part(self, number: Any) -> None:
        item = self._item(number)

        @pl.when(jnp.logical_not(self._is_whole(item)))
        def _wait() -> None:
            self._part_write(item, lax.rem(number, 2)).wait()

    def _first_read_token(self, item: Item) -> Any:
        plan = self._plan
        aligned = lax.div(jnp.maximum(item.token - item.offset, 0), plan.row_tile) * plan.row_tile
        return pl.multiple_of(jnp.minimum(aligned, plan.num_tokens - plan.window_rows), plan.row_tile)

    def _part_reads(self, item: Item, place: Any) -> list[Any]:
        plan, read = self._plan, self._read.at[place]
        tokens = pl.ds(self._first_read_token(item), plan.window_rows)
        new = [
            pltpu.make_async_copy(self._arrays[array].at[tokens, pl.ds(lane, LANES)], self._new.at[place, plane], read)
            for plane, (array, lane) in enumerate(plan.planes)
        ]
        page = self._pages.at[item.page + self._layer[0]]
        return [*new, pltpu.make_async_copy(page, self._old.at[place], read)]

    def _part_write(self, item: Item, place: Any) -> Any:
        page = self._pages.at[item.page + self._layer[0]]
        return pltpu.make_async_copy(self._old.at[place], page, self._written.at[place])

    def _turn(self, item: Item) -> Any:
        """By how many rows what was read is turned: row r of the block is token − offset + r."""
        rows = self._plan.window_rows
        return lax.rem(self._first_read_token(item) - (item.token - item.offset) + rows, rows)

    def _lay_over(self, item: Item, place: Any) -> None:
        """Turns the new tokens to the rows of their slots, over what these have."""
        plan = self._plan
        block, turn = plan.pages.block_size, self._turn(item)
        row = lax.broadcasted_iota(jnp.int32, (block, LANES), 0)
        is_new = (row >= item.offset) & (row < item.offset + item.length)
        # Moving rows is for 32-bit values; the way there and back changes none.
        wide = jnp.int32 if jnp.issubdtype(plan.dtype, jnp.integer) else jnp.float32
        for plane in range(len(plan.planes)):
            turned = pltpu.roll(self._new[place, plane].astype(wide), turn, 0)[:block]
            old = self._old[place, plane].astype(wide)
            self._old[place, plane] = jnp.where(is_new, turned, old).astype(plan.dtype)


class _WordUpdate(_Update):
    """Scales: words of tokens along lanes, [C, T], become those of slots; every block passes through VMEM."""

    def _is_whole(self, item: Item) -> Any:
        return item.length < 0

    def _part_reads(self, item: Item, place: Any) -> list[Any]:
        read, tokens = self._read.at[place], pl.ds(self._first_read_token(item), self._plan.window_rows)
        page = self._pages.at[item.page + self._layer[0]]
        return [
            pltpu.make_async_copy(self._arrays[0].at[:, tokens], self._new.at[place], read),
            pltpu.make_async_copy(page, self._old.at[place], read),
        ]

    def _lay_over(self, item: Item, place: Any) -> None:
        pages = self._plan.pages
        slot = slot_of_word(pages)
        is_new = (slot >= item.offset) & (slot < item.offset + item.length)
        turned = pltpu.roll(self._new[place], self._turn(item), 1)
        rows = in_word_rows([turned[plane : plane + 1] for plane in range(pages.num_planes)], pages)
        self._old[place] = jnp.where(is_new, rows, self._old[place])
