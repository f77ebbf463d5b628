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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import softmax
from pallas_kernels.decode_tile import DecodeTile
from pallas_kernels.pages import LANES, NO_SLOT

TABLES_HELD = 3
"""Rows whose table is in scalar memory: the one that is fetched and the next."""

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
    """Blocks of one row in VMEM: queries, new rows [1, C, 128], sinks f32[H, 128] or None, outputs."""

    queries: Any
    new_rows: Any
    sinks: Any
    outputs: Any


class Pool(NamedTuple):
    """In HBM: tables i32[S, M / 128, 128] and pages [num_pages, C, P, 128]."""

    tables: Any
    pages: Any


class Scratch(NamedTuple):
    """VMEM: tiles [buffers, C, T, 128], writes [WRITES_HELD, C, row tile, 128], a row's running softmax f32[H, …].

    SMEM: tables i32[TABLES_HELD, M / 128, 128], queue i32[4] (see ``_Queue``). Semaphores of buffers, tables, writes.
    """

    tiles: Any
    writes: Any
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
        sinks = rest.pop(0) if has_sinks else None
        tables, _aliased, outputs, pages = rest[:4]
        queue = _Queue(tile, scalars, Pool(tables, pages), Scratch(*rest[4:]))
        _program(tile, queue, Arrays(queries, new_rows, sinks, outputs))

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
            self._page_copy(page, buffer, position).start()

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
            here = self.scratch.tiles.at[buffer]
            pltpu.make_async_copy(here, here, self.scratch.fetched.at[buffer]).wait()

        @pl.when(first + tile.blocks > num_blocks)
        def _part() -> None:
            one = self._page_copy(0, buffer, 0)
            lax.fori_loop(0, num_blocks - first, lambda _i, _c: one.wait(), None)

        return buffer

    def _page_copy(self, page: Any, buffer: Any, position: Any) -> Any:
        begin = pl.multiple_of(position * self._tile.block, self._tile.block)
        return pltpu.make_async_copy(
            self._pool.pages.at[page],
            self.scratch.tiles.at[buffer, :, pl.ds(begin, self._tile.block), :],
            self.scratch.fetched.at[buffer],
        )

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
            target = self._pool.pages.at[page, :, pl.ds(begin, rows), :]
            act(pltpu.make_async_copy(self.scratch.writes.at[held], target, self.scratch.written.at[held]))

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
            _insert_new(tile, queue, arrays.new_rows, (number, kv_len - 1 - index * tile.tokens, buffer))
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


def _insert_new(tile: PagedTile, queue: _Queue, new_ref: Any, where: tuple[Any, Any, Any]) -> None:
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
        both = jnp.where(is_new, new_ref[0, plane : plane + 1, :], here[...])
        here[...] = both
        scratch.writes[held, plane] = both


def _add_tile(tile: PagedTile, arrays: Arrays, scratch: Scratch, buffer: Any, edge: tuple[Any] | None) -> None:
    """One step of the online softmax; ``edge`` has the end of the live keys of a tile that is not wholly seen."""
    heads = tile.heads
    products = range(heads.num_products)
    rows = heads.rows_per_product

    def plane(number: int) -> jax.Array:
        return scratch.tiles[buffer, number]

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
        softmax.weigh(softmax.scaled(tile.shape, score), live, scratch.maximum[product * rows : (product + 1) * rows])
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
        weighted = heads.diagonal(softmax.weighted_sum(step.weights, values))
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
