"""Windowed decode: one tile of keys holds the whole window, so there is no loop over blocks.

A program serves a few sequences, and waits for their blocks one or two sequences at a time while those of later ones
are on their way. Where P divides W the window touches one block more than it fills: of the oldest block the rows from
``kv_len mod P`` on are live, of the newest the rows before, so one select makes a tile of exactly W rows (in no
particular order, which attention does not mind). Otherwise the tile has a block more.

Owns: the kernel body. Must never: be called but through ``ops``.

Axis letters: S sequences, H query heads, C planes of a page, P token slots of a block, M blocks of a row, W window.
"""

from __future__ import annotations

import dataclasses
import functools
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
from pallas_kernels.scales import NoScales, TileScales, slot_of_word, tile_scales


@dataclasses.dataclass(frozen=True)
class WindowTile(DecodeTile):
    """The static plan of a windowed decode.

    Attributes:
        sequences: of one program; a multiple of ``together``.
        together: sequences that are computed in one basic block.
        turns: windows that each place of a program has room for, which programs use in turn: so more are on their way
            than one program computes.
    """

    sequences: int
    together: int
    turns: int

    @property
    def ahead(self) -> int:
        """How many rows ahead of the one that is computed blocks are fetched."""
        return self.sequences * self.turns - self.together

    @property
    def merged(self) -> bool:
        """Whether the oldest and the newest block share P rows of the tile. M is at least 2 then: W ≥ P > 1."""
        assert self.shape.window is not None
        return self.shape.window % self.block == 0

    @property
    def fetched_blocks(self) -> int:
        """M, blocks a sequence has room for."""
        return self.shape.table_width

    @property
    def tile_blocks(self) -> int:
        """Blocks of the tile that is multiplied."""
        return self.fetched_blocks - 1 if self.merged else self.fetched_blocks


class Scalars(NamedTuple):
    """Scalars in SMEM: tables i32[S · M], kv_lens i32[S], slots i32[S], layer i32[1]."""

    tables: Any
    kv_lens: Any
    slots: Any
    layer: Any


class Buffers(NamedTuple):
    """VMEM and semaphores.

    ``blocks`` has an array [turns, C, M · P, 128] for each place, not one array with an axis more: so the compiler sees
    that a copy into one place does not disturb what is read from another, and lets both go on at once. ``writes`` holds
    rows to write, [sequences, C, row tile, 128]. ``fetched`` has semaphores [sequences, turns], ``written`` is one.
    ``num_writes`` is an i32[1] in SMEM: writes of the last program that nobody has waited for. Of integers, ``words``
    has the scales of each place, i32[turns, rows, 128], and ``word_writes`` those of pages to write,
    [sequences, R, 128]; else there are none.
    """

    blocks: Sequence[Any]
    words: Sequence[Any]
    writes: Any
    word_writes: Any
    fetched: Any
    written: Any
    num_writes: Any

    def blocks_of(self, row: Row) -> Any:
        """Where a row's blocks are, [C, M · P, 128]."""
        return self.blocks[row.place].at[row.turn]

    def words_of(self, row: Row) -> Any:
        """Where their scales are, i32[rows, 128]."""
        return self.words[row.place].at[row.turn]

    def fetched_of(self, row: Row) -> Any:
        """The semaphore of both."""
        return self.fetched.at[row.place, row.turn]


class Row(NamedTuple):
    """One sequence: its number, its place among those of a program and the turn there, its live length and blocks."""

    number: Any
    place: int
    turn: Any
    kv_len: Any
    num_blocks: Any


class Arrays(NamedTuple):
    """One program's blocks in VMEM: queries, new rows [sequences, C, 128], sinks f32[H, 128] or None, outputs.

    new_words: of integers, the scales of the new rows in every slot of a page, i32[sequences, R, 128]; else None.
    """

    queries: Any
    new_rows: Any
    new_words: Any
    sinks: Any
    outputs: Any


def decode_kernel(tile: WindowTile, num_rows: int, has_sinks: bool) -> Callable[..., None]:
    """The body of ``pallas_call``: scalars, inputs, outputs and scratch in the order of ``ops.decode``."""

    def body(*refs: Any) -> None:
        scalars, rest = Scalars(*refs[:4]), list(refs[4:])
        queries, new_rows = rest.pop(0), rest.pop(0)
        new_words = rest.pop(0) if tile.scaled else None
        sinks = rest.pop(0) if has_sinks else None
        # The pool comes in and goes out, and is the same.
        outputs, pool = rest[tile.pool_arrays], rest[tile.pool_arrays + 1 : 2 * tile.pool_arrays + 1]
        scratch = rest[2 * tile.pool_arrays + 1 :]
        blocks = [scratch.pop(0) for _ in range(tile.sequences)]
        words = [scratch.pop(0) for _ in range(tile.sequences)] if tile.scaled else []
        writes, word_writes = scratch.pop(0), scratch.pop(0) if tile.scaled else None
        mover = _Mover(tile, num_rows, scalars, pool, Buffers(blocks, words, writes, word_writes, *scratch))
        _program(tile, Arrays(queries, new_rows, new_words, sinks, outputs), mover)

    return body


def _program(tile: WindowTile, arrays: Arrays, mover: _Mover) -> None:
    number = pl.program_id(0)

    @pl.when(number == 0)
    def _first() -> None:
        mover.buffers.num_writes[0] = 0
        for early in range(tile.ahead):
            mover.fetch(mover.row(early, early % tile.sequences))

    rows = [mover.row(number * tile.sequences + place, place) for place in range(tile.sequences)]
    longest = functools.reduce(jnp.maximum, [row.kv_len for row in rows])
    mover.wait_written()

    @pl.when(longest > 0)
    def _attend() -> None:
        for first in range(0, tile.sequences, tile.together):
            gang = rows[first : first + tile.together]
            scored = []
            for row in gang:
                mover.wait_fetched(row)
                # One basic block from here to the next wait.
                mover.fetch_ahead(row)
                scored.append(_score(tile, row, arrays, mover.buffers))

            # The compiler puts what nothing waits for, such as the start of copies, at the end of a basic block: this
            # one ends here, where products still go on beside it.
            @pl.when(mover.always())
            def _rest(scored: list[_Scored] = scored) -> None:
                weights = [_weigh(tile, one, arrays) for one in scored]
                for one, its_weights in zip(scored, weights, strict=True):
                    _finish(tile, one, its_weights, arrays, mover)

    @pl.when(longest == 0)
    def _nothing() -> None:
        arrays.outputs[...] = jnp.zeros_like(arrays.outputs)
        for row in rows:
            mover.fetch_ahead(row)

    @pl.when(number + 1 == pl.num_programs(0))
    def _last() -> None:
        mover.wait_written()


class _Mover:
    """Everything that crosses between the pool and VMEM."""

    def __init__(
        self, tile: WindowTile, num_rows: int, scalars: Scalars, pool: Sequence[Any], buffers: Buffers
    ) -> None:
        self._tile, self._num_rows = tile, num_rows
        self._scalars, self._pool, self.buffers = scalars, pool, buffers

    def row(self, number: Any, place: int) -> Row:
        """A row; one without keys where the number is past the last."""
        tile = self._tile
        turn = lax.rem(lax.div(number, tile.sequences), tile.turns) if tile.turns > 1 else 0
        kv_len = jnp.where(number < self._num_rows, self._scalars.kv_lens[jnp.minimum(number, self._num_rows - 1)], 0)
        return Row(number, place, turn, kv_len, pl.cdiv(kv_len, tile.block))

    def fetch_ahead(self, row: Row) -> None:
        """Starts the fetch of a later row, to the place that became free last."""
        ahead = self._tile.ahead
        self.fetch(self.row(row.number + ahead, (row.place + ahead) % self._tile.sequences))

    def fetch(self, row: Row) -> None:
        """Starts the copies of the row's live blocks, and of no other; each predicated, so that no branch is taken."""
        for position, (block, is_live) in enumerate(_blocks_of_positions(self._tile, row)):
            page = self._page(row, block)

            @pl.when(is_live)
            def _start(page: Any = page, position: int = position) -> None:
                for copy in self._copies(row, page, position):
                    copy.start()

    def wait_fetched(self, row: Row) -> None:
        """Waits for the row's blocks, and clears what it has none for."""
        tile = self._tile

        @pl.when(row.num_blocks == tile.fetched_blocks)
        def _whole() -> None:
            # One wait for the bytes of all copies.
            whole = [self.buffers.blocks_of(row)]
            if tile.scaled:
                whole.append(self.buffers.words_of(row).at[: tile.fetched_blocks * tile.word_rows])
            for here in whole:
                pltpu.make_async_copy(here, here, self.buffers.fetched_of(row)).wait()

        @pl.when(row.num_blocks < tile.fetched_blocks)
        def _part() -> None:
            def one(_index: Any, _: None) -> None:
                for copy in self._copies(row, 0, 0):
                    copy.wait()

            lax.fori_loop(0, row.num_blocks, one, None)
            _clear_unfetched(tile, row, self.buffers.blocks_of(row))

    def always(self) -> Any:
        """True, which the compiler does not know."""
        return self._scalars.layer[0] >= 0

    def _page(self, row: Row, block: Any) -> Any:
        # Read whether or not there is such a block, so that reading needs no predicate.
        column = jnp.minimum(row.number, self._num_rows - 1) * self._tile.fetched_blocks + block
        return self._scalars.tables[column] + self._scalars.layer[0]

    def _copies(self, row: Row, page: Any, position: int) -> list[Any]:
        """Of a block, and of its scales where it has some."""
        tile, buffers = self._tile, self.buffers
        targets = [buffers.blocks_of(row).at[:, pl.ds(position * tile.block, tile.block), :]]
        if tile.scaled:
            targets.append(buffers.words_of(row).at[pl.ds(position * tile.word_rows, tile.word_rows)])
        return [
            pltpu.make_async_copy(there.at[page], here, buffers.fetched_of(row))
            for there, here in zip(self._pool, targets, strict=True)
        ]

    def write(self, row: Row) -> None:
        """Starts the copy of the new token's rows to the pool, where it has a slot."""
        slot = self._scalars.slots[row.number]

        @pl.when((slot != NO_SLOT) & (row.kv_len > 0))
        def _start() -> None:
            block, rows = self._tile.block, self._tile.write_rows
            page = lax.div(slot, block) + self._scalars.layer[0]
            begin = pl.multiple_of(lax.div(lax.rem(slot, block), rows) * rows, rows)
            targets = [self._pool[0].at[page, :, pl.ds(begin, rows), :], *(words.at[page] for words in self._pool[1:])]
            for written, target in zip(self._writes(), targets, strict=True):
                pltpu.make_async_copy(written.at[row.place], target, self.buffers.written).start()
            self.buffers.num_writes[0] += 1

    def _writes(self) -> list[Any]:
        return [self.buffers.writes, *([self.buffers.word_writes] if self._tile.scaled else [])]

    def wait_written(self) -> None:
        """Waits for all writes of the last program."""
        count = self.buffers.num_writes[0]

        @pl.when(count == self._tile.sequences)
        def _all() -> None:
            # One wait for the bytes of all copies.
            for writes in self._writes():
                pltpu.make_async_copy(writes, writes, self.buffers.written).wait()

        @pl.when(count < self._tile.sequences)
        def _some() -> None:
            def one(_index: Any, _: None) -> None:
                for writes in self._writes():
                    pltpu.make_async_copy(writes.at[0], writes.at[0], self.buffers.written).wait()

            lax.fori_loop(0, count, one, None)

        self.buffers.num_writes[0] = 0


def _blocks_of_positions(tile: WindowTile, row: Row) -> list[tuple[Any, Any]]:
    """For each position in a buffer, the block of the row's table that belongs there and whether there is one.

    Merged tiles have the newest block last, where the select looks for it. Where the table is not full the first
    position, which is an oldest block's, stays empty.
    """
    most = tile.fetched_blocks
    if not tile.merged:
        return [(position, position < row.num_blocks) for position in range(most)]
    is_full = row.num_blocks == most
    missing = jnp.where(is_full, 0, 1)
    between = [(i - missing, i < row.num_blocks - 1 + missing) for i in range(1, most - 1)]
    return [(0, is_full), *between, (jnp.maximum(row.num_blocks, 1) - 1, row.num_blocks > 0)]


class _Scored(NamedTuple):
    """A row between its stages: f32[rows_per_product, tile rows] scores of each product; scales of its keys."""

    row: Row
    scores: list[jax.Array]
    scales: NoScales


def _score(tile: WindowTile, row: Row, arrays: Arrays, buffers: Buffers) -> _Scored:
    heads = tile.heads
    planes = _complete_planes(tile, row, arrays.new_rows, buffers)
    scales = _complete_scales(tile, row, arrays.new_words, buffers) if tile.scaled else NoScales()
    scores = [
        softmax.scores(
            heads.product_queries(lambda a, b: arrays.queries[row.place, a:b, :], product, tile.compute_dtype),
            heads.product_keys(planes, product).astype(tile.compute_dtype),
        )
        for product in range(heads.num_products)
    ]
    return _Scored(row, [scales.of_scores(product, score) for product, score in enumerate(scores)], scales)


def _weigh(tile: WindowTile, scored: _Scored, arrays: Arrays) -> list[softmax.Weights]:
    """The softmax of each product's scores."""
    live = _live_keys(tile, scored.row)
    return [
        softmax.weigh(softmax.scaled(tile.shape, score), live, _sinks_of(tile, arrays.sinks, product))
        for product, score in enumerate(scored.scores)
    ]


def _finish(
    tile: WindowTile, scored: _Scored, weights: Sequence[softmax.Weights], arrays: Arrays, mover: _Mover
) -> None:
    """Weighted sums of all heads, then outputs, then the write of the new token."""
    heads, row = tile.heads, scored.row
    blocks_ref, rows = mover.buffers.blocks_of(row), tile.tile_blocks * tile.block
    live = _live_keys(tile, row)
    weighted = [
        heads.diagonal(
            softmax.weighted_sum(
                scored.scales.of_weights(product, one.weights, live),
                heads.product_values(lambda plane: blocks_ref[plane, :rows, :], product).astype(tile.compute_dtype),
            )
        )
        for product, one in enumerate(weights)
    ]
    sinks = [_sinks_of(tile, arrays.sinks, product) for product in range(heads.num_products)]
    totals = softmax.totals(weights, sinks, tile.compute_dtype)
    outputs = [one * softmax.across(1.0 / total, one.shape[1]) for one, total in zip(weighted, totals, strict=True)]
    _store(tile, row, arrays.outputs, [jnp.where(row.kv_len > 0, output, 0.0) for output in outputs])
    mover.write(row)


def _sinks_of(tile: WindowTile, sinks_ref: Any, product: int) -> jax.Array | None:
    if sinks_ref is None:
        return None
    rows = tile.heads.rows_per_product
    return sinks_ref[product * rows : (product + 1) * rows, :]


def _store(tile: WindowTile, row: Row, outputs_ref: Any, results: Sequence[jax.Array]) -> None:
    rows = tile.heads.output_shape[0] // tile.heads.num_products
    for product, result in enumerate(results):
        part = tile.heads.pack_outputs(result).astype(outputs_ref.dtype)
        outputs_ref[row.place, product * rows : (product + 1) * rows, :] = part


def _newest_begin(tile: WindowTile, row: Row) -> Any:
    """The row of the buffer at which the newest block begins."""
    place = tile.fetched_blocks - 1 if tile.merged else jnp.maximum(row.num_blocks, 1) - 1
    return place * tile.block


def _clear_unfetched(tile: WindowTile, row: Row, blocks_ref: Any) -> None:
    """Zeroes the blocks of a buffer that a short row does not fill: what lies there may be NaN, and 0 · NaN is NaN."""
    empty = jnp.zeros((tile.shape.pages.num_planes, tile.block, LANES), tile.kv_dtype)

    def clear(position: Any) -> None:
        blocks_ref[:, pl.ds(pl.multiple_of(position * tile.block, tile.block), tile.block), :] = empty

    if tile.merged:
        clear(0)
    end = tile.fetched_blocks - 1 if tile.merged else tile.fetched_blocks
    lax.fori_loop(row.num_blocks, end, lambda position, _: clear(position), None)


def _complete_planes(tile: WindowTile, row: Row, new_ref: Any, buffers: Buffers) -> Callable[[int], jax.Array]:
    """Puts the new token's rows among the others, here and in what is written back; gives the planes of the tile.

    The same planes then lie in the first rows of the row's buffer.
    """
    blocks_ref, size = buffers.blocks_of(row), tile.write_rows
    last = lax.rem(jnp.maximum(row.kv_len, 1) - 1, tile.block)
    within = lax.rem(last, size)
    newest = _newest_begin(tile, row)
    begin = pl.multiple_of(newest + last - within, size)
    is_new = lax.broadcasted_iota(jnp.int32, (size, LANES), 0) == within
    edges = []
    for plane in range(tile.shape.pages.num_planes):
        new_row = new_ref[row.place, plane : plane + 1, :]
        old = blocks_ref[plane, pl.ds(begin, size), :]
        buffers.writes[row.place, plane] = jnp.where(is_new, new_row, old)
        if tile.merged:
            edges.append(_merged_edge(tile, blocks_ref.at[plane], new_row, last))
        else:
            _complete_in_place(tile, row, blocks_ref.at[plane], new_row)
    if not tile.merged:
        return lambda plane: blocks_ref[plane]
    for plane, edge in enumerate(edges):
        blocks_ref[plane, : tile.block, :] = edge
    end = tile.tile_blocks * tile.block
    if end == tile.block:
        return lambda plane: edges[plane]
    return lambda plane: jnp.concatenate([edges[plane], blocks_ref[plane, tile.block : end, :]], axis=0)


def _complete_scales(tile: WindowTile, row: Row, new_ref: Any, buffers: Buffers) -> TileScales:
    """As ``_complete_planes``, for the words of the scales."""
    words_ref, rows = buffers.words_of(row), tile.word_rows
    last = lax.rem(jnp.maximum(row.kv_len, 1) - 1, tile.block)
    slot = slot_of_word(tile.shape.pages)
    new = new_ref[row.place]
    newest_block = pl.ds(lax.div(_newest_begin(tile, row), tile.block) * rows, rows)
    newest = words_ref[newest_block, :]
    complete = jnp.where(slot == last, new, newest)
    buffers.word_writes[row.place] = complete
    if not tile.merged:
        words_ref[newest_block, :] = complete
    else:
        words_ref[:rows, :] = jnp.where(slot <= last, complete, words_ref[:rows, :])
    return tile_scales(tile.heads, words_ref, tile.tile_blocks)


def _merged_edge(tile: WindowTile, plane_ref: Any, new_row: jax.Array, last: Any) -> jax.Array:
    """The first P rows of a plane of W rows: those of the newest block that are live, then those of the oldest."""
    begin = (tile.fetched_blocks - 1) * tile.block
    newest, oldest = plane_ref[begin:, :], plane_ref[: tile.block, :]
    index = lax.broadcasted_iota(jnp.int32, newest.shape, 0)
    return jnp.where(index == last, new_row, jnp.where(index < last, newest, oldest))


def _complete_in_place(tile: WindowTile, row: Row, plane_ref: Any, new_row: jax.Array) -> None:
    """Zeroes the rows of the oldest block before the window and of the newest after the new token, and inserts that."""
    assert tile.shape.window is not None
    for begin in (0, pl.multiple_of(_newest_begin(tile, row), tile.block)):
        rows = plane_ref[pl.ds(begin, tile.block), :]
        index = lax.broadcasted_iota(jnp.int32, rows.shape, 0) + begin
        live = (index >= row.kv_len - tile.shape.window) & (index < row.kv_len - 1)
        rows = jnp.where(live, rows, jnp.zeros_like(rows))
        plane_ref[pl.ds(begin, tile.block), :] = jnp.where(index == row.kv_len - 1, new_row, rows)


def _live_keys(tile: WindowTile, row: Row) -> jax.Array:
    """bool[1, rows of the tile]: which of its keys the query sees."""
    block = tile.block
    position = lax.broadcasted_iota(jnp.int32, (1, tile.tile_blocks * block), 1)
    if not tile.merged:
        assert tile.shape.window is not None
        return (position < row.kv_len) & (position >= row.kv_len - tile.shape.window)
    # A table that is full, or would be but for a newest block that is complete, fills the window.
    newest_rows = lax.rem(row.kv_len - 1, block) + 1
    edge_rows = jnp.where(row.num_blocks == tile.fetched_blocks, block, newest_rows)
    return (position < edge_rows) | ((position >= block) & (position < row.num_blocks * block))
