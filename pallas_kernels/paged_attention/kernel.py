"""Paged decode: an online softmax over tiles of a row's blocks, for contexts of any length.

The tiles of all rows are one queue: while one is computed, the next ones are fetched, whosever they are, so that the
first tile of a row does not wait. The queue's fetching end runs ahead of its computing end by the number of buffers
less one. Tables are too large for scalar memory (256 rows of 128k tokens are 2 MiB): they stay in HBM, and each row's
is copied a row or two ahead.

Owns: the kernel body. Must never: be called but through ``ops``.

Axis letters: S rows, H query heads, C planes of a page, P token slots of a block, T tokens of a tile, W window.
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

from pallas_kernels import softmax
from pallas_kernels.decode_tile import DecodeTile
from pallas_kernels.pages import LANES, NO_SLOT
from pallas_kernels.scales import NoScales, slot_of_word, tile_scales

TABLES_HELD = 3
"""Rows whose table is in scalar memory: the one whose blocks are fetched and the two after it."""

WRITES_HELD = 2


@dataclasses.dataclass(frozen=True)
class PagedTile(DecodeTile):
    """The static plan of a paged decode.

    Attributes:
        blocks: of one tile; a power of two up to 128.
        buffers: tiles held at once, at least 2.
    """

    blocks: int
    buffers: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.blocks * self.block


class Scalars(NamedTuple):
    """In SMEM: kv_lens i32[S], slots i32[S], order i32[S], and i32[2]: the layer, and how many rows are live."""

    kv_lens: Any
    slots: Any
    order: Any
    layer_and_live: Any


class Arrays(NamedTuple):
    """Blocks of one row in VMEM: queries, new rows [1, C, 128], sinks f32[H, 128] or None, outputs.

    new_words: of integers, the scales of the new rows in every slot of a page, i32[1, R, 128]; else None.
    """

    queries: Any
    new_rows: Any
    new_words: Any
    sinks: Any
    outputs: Any


class Pool(NamedTuple):
    """In HBM: tables i32[S, M / 128, 128]; pages [num_pages, C, P, 128] and, of integers, words [num_pages, R, 128]."""

    tables: Any
    views: Sequence[Any]


class Scratch(NamedTuple):
    """VMEM: tiles [buffers, C, T, 128], writes [WRITES_HELD, C, row tile, 128], a row's running softmax f32[H, …].

    Of integers, words i32[buffers, rows, 128] of the tiles' scales and word_writes [WRITES_HELD, R, 128]; else None.
    SMEM: tables i32[TABLES_HELD, M / 128, 128], queue i32[4] (see ``_Queue``). Semaphores of buffers, tables, writes.
    """

    tiles: Any
    words: Any
    writes: Any
    word_writes: Any
    maximum: Any
    total: Any
    weighted: Any
    tables: Any
    queue: Any
    fetched: Any
    tabled: Any
    written: Any


def decode_kernel(tile: PagedTile, has_sinks: bool) -> Callable[..., None]:
    """The body of ``pallas_call``: scalars, inputs, outputs and scratch in the order of ``ops.decode``."""

    def body(*refs: Any) -> None:
        scalars, rest = Scalars(*refs[:4]), list(refs[4:])
        queries, new_rows = rest.pop(0), rest.pop(0)
        new_words = rest.pop(0) if tile.scaled else None
        sinks = rest.pop(0) if has_sinks else None
        tables = rest.pop(0)
        # The pool comes in and goes out, and is the same.
        outputs, views = rest[tile.pool_arrays], rest[tile.pool_arrays + 1 : 2 * tile.pool_arrays + 1]
        scratch = rest[2 * tile.pool_arrays + 1 :]
        tiles, words = scratch.pop(0), scratch.pop(0) if tile.scaled else None
        writes, word_writes = scratch.pop(0), scratch.pop(0) if tile.scaled else None
        queue = _Queue(tile, scalars, Pool(tables, views), Scratch(tiles, words, writes, word_writes, *scratch))
        _program(tile, queue, Arrays(queries, new_rows, new_words, sinks, outputs))

    return body


def _program(tile: PagedTile, queue: _Queue, arrays: Arrays) -> None:
    number = pl.program_id(0)

    @pl.when(number == 0)
    def _first() -> None:
        queue.start()

    @pl.when(number < queue.num_live)
    def _row() -> None:
        _attend_row(tile, queue, arrays, number)

    @pl.when(number + 1 == pl.num_programs(0))
    def _last() -> None:
        for back in range(WRITES_HELD):
            queue.wait_written(queue.num_live - 1 - back)


class _Queue:
    """The tiles of all live rows in order, fetched at one end and computed at the other.

    Its state is in SMEM: the number (in order) of the row whose tile is fetched next, that tile's index in its row, and
    how many tiles have been fetched and computed.
    """

    def __init__(self, tile: PagedTile, scalars: Scalars, pool: Pool, scratch: Scratch) -> None:
        self._tile, self._scalars, self._pool, self.scratch = tile, scalars, pool, scratch
        self.num_live = scalars.layer_and_live[1]

    def row(self, number: Any) -> Any:
        """The row that is computed ``number``-th."""
        return self._scalars.order[number]

    def kv_len(self, number: Any) -> Any:
        """Keys of that row."""
        return self._scalars.kv_lens[self.row(number)]

    def start(self) -> None:
        """Fetches what the first tiles need."""
        for entry in range(4):
            self.scratch.queue[entry] = 0
        for number in range(TABLES_HELD):
            self._copy_table(number)
        for _ in range(self._tile.buffers - 1):
            self.fetch_next()

    def fetch_next(self) -> None:
        """Starts the fetch of the next tile, if there is one."""
        queue, tile = self.scratch.queue, self._tile
        number, index, fetched = queue[0], queue[1], queue[2]

        @pl.when(number < self.num_live)
        def _fetch() -> None:
            slot = lax.rem(number, TABLES_HELD)

            @pl.when(index == 0)
            def _wait_table() -> None:
                self._table_copy(number, slot).wait()

            kv_len = self.kv_len(number)
            num_blocks = pl.cdiv(kv_len, tile.block)
            self._start_tile(slot, index, num_blocks, lax.rem(fetched, tile.buffers))
            queue[2] = fetched + 1
            is_last = (index + 1) * tile.blocks >= num_blocks

            @pl.when(is_last)
            def _next_row() -> None:
                queue[0], queue[1] = number + 1, 0
                self._copy_table(number + TABLES_HELD)

            @pl.when(jnp.logical_not(is_last))
            def _next_tile() -> None:
                queue[1] = index + 1

    def _start_tile(self, slot: Any, index: Any, num_blocks: Any, buffer: Any) -> None:
        tile = self._tile
        first = index * tile.blocks
        # A tile's blocks are aligned and at most 128, so they lie in one vector of the table.
        vector, column = lax.div(first, LANES), lax.rem(first, LANES)

        def start(position: Any) -> None:
            page = self.scratch.tables[slot, vector, column + position] + self._scalars.layer_and_live[0]
            for copy in self._page_copies(page, buffer, position):
                copy.start()

        @pl.when(first + tile.blocks <= num_blocks)
        def _whole() -> None:
            for position in range(tile.blocks):
                start(position)

        @pl.when(first + tile.blocks > num_blocks)
        def _part() -> None:
            lax.fori_loop(0, num_blocks - first, lambda position, _: start(position), None)

    def wait_tile(self, index: Any, num_blocks: Any) -> Any:
        """Waits for the tile that is computed next, the ``index``-th of its row; gives its buffer."""
        tile, queue = self._tile, self.scratch.queue
        computed = queue[3]
        queue[3] = computed + 1
        buffer = lax.rem(computed, tile.buffers)
        first = index * tile.blocks

        @pl.when(first + tile.blocks <= num_blocks)
        def _whole() -> None:
            # One wait for the bytes of all copies.
            whole = [self.scratch.tiles.at[buffer]]
            if tile.scaled:
                whole.append(self.scratch.words.at[buffer, pl.ds(0, tile.blocks * tile.word_rows)])
            for here in whole:
                pltpu.make_async_copy(here, here, self.scratch.fetched.at[buffer]).wait()

        @pl.when(first + tile.blocks > num_blocks)
        def _part() -> None:
            def one(_index: Any, _: None) -> None:
                for copy in self._page_copies(0, buffer, 0):
                    copy.wait()

            lax.fori_loop(0, num_blocks - first, one, None)

        return buffer

    def _page_copies(self, page: Any, buffer: Any, position: Any) -> list[Any]:
        """Of a block, and of its scales where it has some."""
        tile, scratch = self._tile, self.scratch
        begin = pl.multiple_of(position * tile.block, tile.block)
        targets = [scratch.tiles.at[buffer, :, pl.ds(begin, tile.block), :]]
        if tile.scaled:
            targets.append(scratch.words.at[buffer, pl.ds(position * tile.word_rows, tile.word_rows)])
        return [
            pltpu.make_async_copy(there.at[page], here, scratch.fetched.at[buffer])
            for there, here in zip(self._pool.views, targets, strict=True)
        ]

    def _table_copy(self, number: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(
            self._pool.tables.at[self.row(number)], self.scratch.tables.at[slot], self.scratch.tabled.at[slot]
        )

    def _copy_table(self, number: Any) -> None:
        @pl.when(number < self.num_live)
        def _start() -> None:
            self._table_copy(number, lax.rem(number, TABLES_HELD)).start()

    def write(self, number: Any) -> None:
        """Starts the copy of the row's new token to the pool, where it has a slot."""
        self._if_it_writes(number, lambda copy: copy.start())

    def wait_written(self, number: Any) -> None:
        """Waits for a row's write; none where the number is negative."""

        @pl.when(number >= 0)
        def _wait() -> None:
            self._if_it_writes(jnp.maximum(number, 0), lambda copy: copy.wait())

    def _if_it_writes(self, number: Any, act: Callable[[Any], None]) -> None:
        slot = self._scalars.slots[self.row(number)]

        @pl.when(slot != NO_SLOT)
        def _act() -> None:
            block, rows = self._tile.block, self._tile.write_rows
            page = lax.div(slot, block) + self._scalars.layer_and_live[0]
            begin = pl.multiple_of(lax.div(lax.rem(slot, block), rows) * rows, rows)
            held = lax.rem(number, WRITES_HELD)
            pages, *words = self._pool.views
            act(self._write_copy(self.scratch.writes, held, pages.at[page, :, pl.ds(begin, rows), :]))
            for view in words:
                act(self._write_copy(self.scratch.word_writes, held, view.at[page]))

    def _write_copy(self, writes: Any, held: Any, target: Any) -> Any:
        return pltpu.make_async_copy(writes.at[held], target, self.scratch.written.at[held])

    def has_slot(self, number: Any) -> Any:
        """Whether the row's K/V goes somewhere."""
        return self._scalars.slots[self.row(number)] != NO_SLOT


def _attend_row(tile: PagedTile, queue: _Queue, arrays: Arrays, number: Any) -> None:
    scratch, kv_len = queue.scratch, queue.kv_len(number)
    num_blocks = pl.cdiv(kv_len, tile.block)
    num_tiles = pl.cdiv(num_blocks, tile.blocks)
    _begin_softmax(arrays, scratch)

    def one_tile(index: Any, _: None) -> None:
        queue.fetch_next()
        buffer = queue.wait_tile(index, num_blocks)
        is_last = index + 1 == num_tiles
        is_edge = is_last if tile.shape.window is None else is_last | (index == 0)

        @pl.when(is_last)
        def _new() -> None:
            queue.wait_written(number - WRITES_HELD)
            _insert_new(tile, queue, arrays, (number, kv_len - 1 - index * tile.tokens, buffer))
            queue.write(number)

        @pl.when(is_edge)
        def _edge() -> None:
            _add_tile(tile, arrays, scratch, buffer, (kv_len - index * tile.tokens,))

        @pl.when(jnp.logical_not(is_edge))
        def _inner() -> None:
            _add_tile(tile, arrays, scratch, buffer, None)

    lax.fori_loop(0, num_tiles, one_tile, None)
    _end_softmax(tile, arrays, scratch)


def _begin_softmax(arrays: Arrays, scratch: Scratch) -> None:
    """A running softmax over nothing, or over the sinks, whose values are zero."""
    shape = scratch.maximum.shape
    scratch.maximum[...] = jnp.full(shape, softmax.MASKED) if arrays.sinks is None else arrays.sinks[...]
    scratch.total[...] = jnp.full(shape, 0.0 if arrays.sinks is None else 1.0)
    scratch.weighted[...] = jnp.zeros_like(scratch.weighted)


def _insert_new(tile: PagedTile, queue: _Queue, arrays: Arrays, where: tuple[Any, Any, Any]) -> None:
    """Puts the new token's rows into the row's last tile and beside, among those of its pool tile, to be written."""
    number, last, buffer = where
    scratch, size = queue.scratch, tile.write_rows
    within = lax.rem(last, size)
    begin = pl.multiple_of(last - within, size)
    inserts = queue.has_slot(number) if tile.shape.window is None else jnp.bool_(True)
    is_new = (lax.broadcasted_iota(jnp.int32, (size, LANES), 0) == within) & inserts
    held = lax.rem(number, WRITES_HELD)
    for plane in range(tile.shape.pages.num_planes):
        here = scratch.tiles.at[buffer, plane, pl.ds(begin, size), :]
        both = jnp.where(is_new, arrays.new_rows[0, plane : plane + 1, :], here[...])
        here[...] = both
        scratch.writes[held, plane] = both
    if tile.scaled:
        rows = tile.word_rows
        words = scratch.words.at[buffer, pl.ds(lax.div(last, tile.block) * rows, rows), :]
        is_own = (slot_of_word(tile.shape.pages) == lax.rem(last, tile.block)) & inserts
        page = jnp.where(is_own, arrays.new_words[0], words[...])
        words[...] = page
        scratch.word_writes[held] = page


def _add_tile(tile: PagedTile, arrays: Arrays, scratch: Scratch, buffer: Any, edge: tuple[Any] | None) -> None:
    """One step of the online softmax; ``edge`` has the end of the live keys of a tile that is not wholly seen."""
    heads = tile.heads
    products = range(heads.num_products)
    rows = heads.rows_per_product

    def plane(number: int) -> jax.Array:
        return scratch.tiles[buffer, number]

    scales = tile_scales(heads, scratch.words.at[buffer], tile.blocks) if tile.scaled else NoScales()
    # In stages over all heads: the compiler does not move products past one another.
    scores = [
        softmax.scores(
            heads.product_queries(lambda a, b: arrays.queries[0, a:b, :], product, tile.compute_dtype),
            heads.product_keys(plane, product).astype(tile.compute_dtype),
        )
        for product in products
    ]
    live = None if edge is None else _live(tile, (1, tile.tokens), 1, edge[0])
    steps = [
        softmax.weigh(
            softmax.scaled(tile.shape, scales.of_scores(product, score)),
            live,
            scratch.maximum[product * rows : (product + 1) * rows],
        )
        for product, score in zip(products, scores, strict=True)
    ]
    live_rows = None if edge is None else _live(tile, (tile.tokens, LANES), 0, edge[0])

    def value_plane(number: int) -> jax.Array:
        values = plane(number)
        # What lies past the live rows may be NaN, and 0 · NaN is NaN.
        return values if live_rows is None else jnp.where(live_rows, values, jnp.zeros_like(values))

    sums = softmax.totals(steps, [None for _ in products], tile.compute_dtype)
    for product, step in zip(products, steps, strict=True):
        here = slice(product * rows, (product + 1) * rows)
        values = heads.product_values(value_plane, product).astype(tile.compute_dtype)
        weights = scales.of_weights(product, step.weights, live)
        weighted = heads.diagonal(softmax.weighted_sum(weights, values))
        shrink = jnp.exp(scratch.maximum[here] - step.maximum)
        scratch.maximum[here] = step.maximum
        scratch.total[here] = scratch.total[here] * shrink + sums[product]
        scratch.weighted[here] = scratch.weighted[here] * softmax.across(shrink, weighted.shape[1]) + weighted


def _live(tile: PagedTile, shape: tuple[int, int], axis: int, end: Any) -> jax.Array:
    position = lax.broadcasted_iota(jnp.int32, shape, axis)
    if tile.shape.window is None:
        return position < end
    return (position < end) & (position >= end - tile.shape.window)


def _end_softmax(tile: PagedTile, arrays: Arrays, scratch: Scratch) -> None:
    heads = tile.heads
    rows, packed_rows = heads.rows_per_product, heads.output_shape[0] // heads.num_products
    for product in range(heads.num_products):
        here = slice(product * rows, (product + 1) * rows)
        weighted = scratch.weighted[here]
        result = weighted * softmax.across(1.0 / scratch.total[here], weighted.shape[1])
        packed = heads.pack_outputs(result).astype(arrays.outputs.dtype)
        arrays.outputs[0, product * packed_rows : (product + 1) * packed_rows, :] = packed
