"""Windowed decode: one tile of keys holds the whole window, so there is no loop over blocks.

A program serves a few sequences. While it computes, the blocks of the next program's sequences are fetched; those of
its own are waited for one sequence at a time. Where P divides W the window touches one block more than it fills: of the
oldest block the rows from ``kv_len mod P`` on are live, of the newest the rows before, so one select makes a tile of
exactly W rows (in no particular order, which attention does not mind). Otherwise the tile has a block more.

Owns: the kernel body. Must never: be called but through ``ops``.

Axis letters: S sequences, H query heads, C planes of a page, P token slots of a block, M blocks of a row, W window.
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
from pallas_kernels.heads import HeadLayout
from pallas_kernels.pages import LANES, NO_SLOT, AttentionShape, row_tile


@dataclasses.dataclass(frozen=True)
class WindowTile:
    """The static plan of a windowed decode.

    Attributes:
        heads: the attention and its order of heads.
        sequences: of one program.
        kv_dtype: of the pool.
        compute_dtype: of both operands of the products.
    """

    heads: HeadLayout
    sequences: int
    kv_dtype: jnp.dtype
    compute_dtype: jnp.dtype

    @property
    def shape(self) -> AttentionShape:
        """The attention."""
        return self.heads.shape

    @property
    def block(self) -> int:
        """P."""
        return self.shape.pages.block_size

    @property
    def merged(self) -> bool:
        """Whether the oldest and the newest block share P rows of the tile."""
        assert self.shape.window is not None
        return self.shape.window % self.block == 0

    @property
    def fetched_blocks(self) -> int:
        """M, blocks a sequence has room for."""
        return self.shape.table_width

    @property
    def tile_blocks(self) -> int:
        """Blocks of the tile that is multiplied."""
        return self.fetched_blocks - 1 if self.merged and self.fetched_blocks > 1 else self.fetched_blocks

    @property
    def write_rows(self) -> int:
        """Rows of a plane that are written back for one new token."""
        return row_tile(self.kv_dtype)


class Scalars(NamedTuple):
    """Scalars in SMEM: tables i32[S · M], kv_lens i32[S], slots i32[S], layer i32[1]."""

    tables: Any
    kv_lens: Any
    slots: Any
    layer: Any


class Buffers(NamedTuple):
    """VMEM: blocks [2, sequences, C, M · P, 128], rows to write [2, sequences, C, row tile, 128]; their semaphores."""

    blocks: Any
    writes: Any
    fetched: Any
    written: Any


class Row(NamedTuple):
    """One sequence of a program: its number, where it lies, its live length, and the blocks that hold it."""

    row: Any
    buffer: Any
    place: int
    kv_len: Any
    num_blocks: Any


def decode_kernel(tile: WindowTile, num_rows: int, has_sinks: bool) -> Callable[..., None]:
    """The body of ``pallas_call``: scalars, inputs, outputs and scratch in the order of ``ops.decode``."""

    def body(*refs: Any) -> None:
        scalars, rest = Scalars(*refs[:4]), list(refs[4:])
        queries, new_rows = rest.pop(0), rest.pop(0)
        sinks = rest.pop(0) if has_sinks else None
        _aliased, outputs, pages = rest[:3]
        _program(tile, num_rows, scalars, (queries, new_rows, sinks, outputs), pages, Buffers(*rest[3:]))

    return body


def _program(
    tile: WindowTile,
    num_rows: int,
    scalars: Scalars,
    arrays: tuple[Any, Any, Any, Any],
    pages_ref: Any,
    buffers: Buffers,
) -> None:
    number, programs = pl.program_id(0), num_rows // tile.sequences
    mover = _Mover(tile, scalars, pages_ref, buffers)

    @pl.when(number == 0)
    def _first() -> None:
        # What is never fetched is multiplied by weight 0, so it must be finite.
        buffers.blocks[...] = jnp.zeros_like(buffers.blocks)
        for index in range(tile.sequences):
            mover.fetch(mover.row(number, index))

    @pl.when(number >= 2)
    def _free_write_buffers() -> None:
        for index in range(tile.sequences):
            mover.wait_written(mover.row(number - 2, index))

    @pl.when(number + 1 < programs)
    def _next() -> None:
        for index in range(tile.sequences):
            mover.fetch(mover.row(number + 1, index))

    for index in range(tile.sequences):
        row = mover.row(number, index)

        @pl.when(row.kv_len > 0)
        def _attend(row: Row = row) -> None:
            mover.wait_fetched(row)
            _attend_row(tile, row, arrays, buffers)
            mover.write(row)

        @pl.when(row.kv_len == 0)
        def _nothing(index: int = index) -> None:
            arrays[3][index] = jnp.zeros_like(arrays[3][index])

    @pl.when(number + 1 == programs)
    def _last() -> None:
        for back in range(min(2, programs)):
            for index in range(tile.sequences):
                mover.wait_written(mover.row(number - back, index))


class _Mover:
    """Everything that crosses between the pool and VMEM."""

    def __init__(self, tile: WindowTile, scalars: Scalars, pages_ref: Any, buffers: Buffers) -> None:
        self._tile, self._scalars, self._pages, self._buffers = tile, scalars, pages_ref, buffers

    def row(self, program: Any, index: int) -> Row:
        row = program * self._tile.sequences + index
        kv_len = self._scalars.kv_lens[row]
        return Row(row, lax.rem(program, 2), index, kv_len, pl.cdiv(kv_len, self._tile.block))

    def fetch(self, row: Row) -> None:
        """Starts the copies of the row's live blocks, and of no other."""
        self._each_block(row, lambda copy: copy.start())

    def wait_fetched(self, row: Row) -> None:
        self._each_block(row, lambda copy: copy.wait())

    def _each_block(self, row: Row, act: Callable[[Any], None]) -> None:
        tile = self._tile
        most = tile.fetched_blocks

        @pl.when(row.num_blocks == most)
        def _whole() -> None:
            for block in range(most):
                act(self._copy(row, block, block))

        @pl.when(row.num_blocks < most)
        def _part() -> None:
            def one(block: Any, _: None) -> None:
                act(self._copy(row, block, _place(tile, row, block)))

            lax.fori_loop(0, row.num_blocks, one, None)

    def _copy(self, row: Row, block: Any, place: Any) -> Any:
        tile = self._tile
        page = self._scalars.tables[row.row * tile.fetched_blocks + block] + self._scalars.layer[0]
        rows = pl.ds(place * tile.block, tile.block)
        return pltpu.make_async_copy(
            self._pages.at[page],
            self._buffers.blocks.at[row.buffer, row.place, :, rows, :],
            self._buffers.fetched.at[row.buffer, row.place],
        )

    def write(self, row: Row) -> None:
        """Starts the copy of the new token's rows to the pool, where it has a slot."""
        self._when_written(row, lambda copy: copy.start())

    def wait_written(self, row: Row) -> None:
        self._when_written(row, lambda copy: copy.wait())

    def _when_written(self, row: Row, act: Callable[[Any], None]) -> None:
        slot = self._scalars.slots[row.row]

        @pl.when((slot != NO_SLOT) & (row.kv_len > 0))
        def _act() -> None:
            block, rows = self._tile.block, self._tile.write_rows
            page = lax.div(slot, block) + self._scalars.layer[0]
            begin = pl.multiple_of(lax.div(lax.rem(slot, block), rows) * rows, rows)
            act(
                pltpu.make_async_copy(
                    self._buffers.writes.at[row.buffer, row.place],
                    self._pages.at[page, :, pl.ds(begin, rows), :],
                    self._buffers.written.at[row.buffer, row.place],
                )
            )


def _place(tile: WindowTile, row: Row, block: Any) -> Any:
    """The place in the buffer of a block of a row whose table is not full.

    Merged tiles expect the newest block last, where the select looks for it, and the others after the first place,
    which is left to an oldest block that there is not.
    """
    if not tile.merged:
        return block
    return jnp.where(block == row.num_blocks - 1, tile.fetched_blocks - 1, block + 1)


def _attend_row(tile: WindowTile, row: Row, arrays: tuple[Any, Any, Any, Any], buffers: Buffers) -> None:
    queries_ref, new_ref, sinks_ref, outputs_ref = arrays
    heads = tile.heads
    _insert_new(tile, row, new_ref, buffers)
    _clear_dead(tile, row, buffers)
    planes = _merged_planes(tile, row, buffers) if tile.merged else _plain_planes(tile, row, buffers)
    live = _live_keys(tile, row)

    # In stages over all heads: the compiler does not move products past one another.
    products = range(heads.num_products)
    scores = [
        softmax.scores(
            heads.product_queries(lambda a, b: queries_ref[row.place, a:b, :], product, tile.compute_dtype),
            heads.product_keys(planes, product).astype(tile.compute_dtype),
        )
        for product in products
    ]
    weights = [
        softmax.weigh(softmax.scaled(tile.shape, score), live, _sinks_of(tile, sinks_ref, product))
        for product, score in zip(products, scores, strict=True)
    ]
    weighted = [
        softmax.weighted_sum(weights[product].weights, heads.product_values(planes, product).astype(tile.compute_dtype))
        for product in products
    ]
    _store(tile, row, outputs_ref, [w / one.total for w, one in zip(weighted, weights, strict=True)])


def _sinks_of(tile: WindowTile, sinks_ref: Any, product: int) -> jax.Array | None:
    if sinks_ref is None:
        return None
    rows = tile.heads.rows_per_product
    return sinks_ref[product * rows : (product + 1) * rows, :1]


def _store(tile: WindowTile, row: Row, outputs_ref: Any, results: Sequence[jax.Array]) -> None:
    rows = tile.heads.output_shape[0] // tile.heads.num_products
    for product, result in enumerate(results):
        part = tile.heads.product_outputs(result).astype(outputs_ref.dtype)
        outputs_ref[row.place, product * rows : (product + 1) * rows, :] = part


def _newest_begin(tile: WindowTile, row: Row) -> Any:
    """The row of the buffer at which the newest block begins."""
    place = tile.fetched_blocks - 1 if tile.merged else row.num_blocks - 1
    return place * tile.block


def _insert_new(tile: WindowTile, row: Row, new_ref: Any, buffers: Buffers) -> None:
    """Puts the new token's rows among those of its block, and what must be written back beside."""
    last = lax.rem(row.kv_len - 1, tile.block)
    size = tile.write_rows
    within = lax.rem(last, size)
    begin = pl.multiple_of(_newest_begin(tile, row) + last - within, size)
    here = buffers.blocks.at[row.buffer, row.place, :, pl.ds(begin, size), :]
    old = here[...]
    is_new = lax.broadcasted_iota(jnp.int32, old.shape, 1) == within
    both = jnp.where(is_new, new_ref[row.place][:, None, :], old)
    here[...] = both
    buffers.writes[row.buffer, row.place] = both


def _clear_dead(tile: WindowTile, row: Row, buffers: Buffers) -> None:
    """Zeroes rows of the buffer that hold no key of this row: a recycled block may hold NaN, and 0 · NaN is NaN."""
    here = buffers.blocks.at[row.buffer, row.place]
    planes = tile.shape.pages.num_planes
    empty = jnp.zeros((planes, tile.block, LANES), tile.kv_dtype)

    def clear(place: Any) -> None:
        here[:, pl.ds(pl.multiple_of(place * tile.block, tile.block), tile.block), :] = empty

    @pl.when(row.num_blocks < tile.fetched_blocks)
    def _short() -> None:
        if tile.merged:
            clear(0)
        first = row.num_blocks
        last = tile.fetched_blocks - 1 if tile.merged else tile.fetched_blocks
        lax.fori_loop(first, last, lambda place, _: clear(place), None)

    if not tile.merged:
        assert tile.shape.window is not None
        _keep_rows(tile, here, 0, (row.kv_len - tile.shape.window, tile.block))
        begin = pl.multiple_of(_newest_begin(tile, row), tile.block)
        _keep_rows(tile, here, begin, (0, row.kv_len - begin))


def _keep_rows(tile: WindowTile, here: Any, begin: Any, live: tuple[Any, Any]) -> None:
    """Zeroes the rows of the block at ``begin`` that are not in the range ``live``, counted from there."""
    place = here.at[:, pl.ds(begin, tile.block), :]
    rows = place[...]
    index = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
    place[...] = jnp.where((index >= live[0]) & (index < live[1]), rows, jnp.zeros_like(rows))


def _plain_planes(tile: WindowTile, row: Row, buffers: Buffers) -> Callable[[int], jax.Array]:
    return lambda plane: buffers.blocks[row.buffer, row.place, plane]


def _merged_planes(tile: WindowTile, row: Row, buffers: Buffers) -> Callable[[int], jax.Array]:
    """Planes of W rows: the first P are those of the newest block that are live, then those of the oldest."""
    block, end = tile.block, tile.tile_blocks * tile.block
    here = buffers.blocks.at[row.buffer, row.place]
    newest_rows = lax.rem(row.kv_len - 1, block) + 1
    from_newest = lax.broadcasted_iota(jnp.int32, (block, LANES), 0) < newest_rows

    def plane(index: int) -> jax.Array:
        last = (tile.fetched_blocks - 1) * block
        newest = here[index, last : last + block, :]
        oldest = here[index, :block, :] if tile.fetched_blocks > 1 else jnp.zeros_like(newest)
        edge = jnp.where(from_newest, newest, oldest)
        return edge if end == block else jnp.concatenate([edge, here[index, block:end, :]], axis=0)

    return plane


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
