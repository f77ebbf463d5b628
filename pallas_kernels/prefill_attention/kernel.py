"""Prefill: query tiles times key tiles, a whole window (or a stretch of the context) of keys in VMEM at once.

A *unit* is a visit (a query tile and one row in it) and a group of kv heads. Its keys are a *stream*: blocks of the
pool, then, where a window slides, the step's own keys from the activations; it is cut into *stretches* that fit VMEM, a
window into one. While a stretch is computed the next one is fetched, of the next unit if need be.

A stretch is computed in two passes over its key tiles. The first makes scores, keeps them in VMEM and the maximum of
each lane; the second, when the maximum of each row is known, makes weights and sums. So the accumulated sums are
rescaled once a stretch and lanes are joined once a row, not once a tile (the online softmax of Milakov & Gimelshein,
arXiv 1805.02867, with a stretch as its step). Only tiles at an edge of what is seen are masked.

Owns: the kernel body. Must never: be called but through ``ops``, or write the pool.

Axis letters: as in ``tile``; V visits, C planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import softmax
from pallas_kernels.pages import LANES
from pallas_kernels.prefill_attention.edges import NOT_A_KEY, Edges, first_seen_key
from pallas_kernels.prefill_attention.refs import Arrays, Scalars, Scratch, Stretch, Visit
from pallas_kernels.prefill_attention.stretch_scales import NoStretchScales, ScaleRefs, StretchScales
from pallas_kernels.prefill_attention.tile import HALF, PrefillTile
from pallas_kernels.prefill_rows import VISIT_FIELDS

LOG2_E = math.log2(math.e)
"""Scores are kept times this, so that weights are powers of two, which the hardware has."""


def prefill_kernel(tile: PrefillTile, num_optional: tuple[int, int], table_width: int) -> Callable[..., None]:
    """The body of ``pallas_call``; refs in the order of ``ops``.

    Args:
        tile: the plan.
        num_optional: arrays of the step's own keys and values (0 to 2), and of sinks (0 or 1).
        table_width: columns of a windowed row's table.
    """

    def body(*all_refs: Any) -> None:
        scalars, rest = Scalars(*all_refs[:4]), list(all_refs[4:])
        queries = rest.pop(0)
        own = [rest.pop(0) for _ in range(num_optional[0])]
        own_words = rest.pop(0) if tile.scaled and tile.reads_own else None
        pages = rest.pop(0)
        pool_words = rest.pop(0) if tile.scaled else None
        tables = None if tile.reads_own else rest.pop(0)
        sinks = rest.pop(0) if num_optional[1] else None
        _aliased, outputs, *scratch = rest
        arrays = Arrays(queries, own, pages, tables, sinks, outputs)
        of_keys = Scratch(*scratch[: len(Scratch._fields)])
        scales = NoStretchScales()
        if tile.scaled:
            words, *own_scratch, of_lanes = scratch[len(Scratch._fields) :]
            own_here = own_scratch[0] if own_scratch else None
            refs = ScaleRefs(pool_words, own_words, words, own_here, of_lanes, of_keys.fetched_kv)
            scales = StretchScales(tile, refs)
        _Prefill(tile, table_width, (scalars, arrays, of_keys), scales).run()

    return body


class _Prefill:
    """One call: the loops over units and stretches, with what is copied when."""

    def __init__(
        self,
        tile: PrefillTile,
        table_width: int,
        refs: tuple[Scalars, Arrays, Scratch],
        scales: NoStretchScales,
    ) -> None:
        self._tile, self._table_width, self._scales = tile, table_width, scales
        self._scalars, self._arrays, self._scratch = refs
        self._work = _StretchWork(tile, self._arrays.sinks, self._scratch, scales)

    def run(self) -> None:
        """All units."""
        num_units = self._scalars.num_visits[0] * self._tile.head_groups

        @pl.when(num_units > 0)
        def _any() -> None:
            self._start_table(0)
            self._wait_table(0)
            self._start_queries(0)
            self._start_kv(0, self._stretch(0, 0), 0)
            lax.fori_loop(0, num_units, lambda unit, place: self._unit(unit, place, num_units), jnp.int32(0))

            def drain(unit: Any) -> None:
                @pl.when((unit >= 0) & self._is_whole(self._visit(jnp.maximum(unit, 0))))
                def _wait() -> None:
                    self._output_copy(jnp.maximum(unit, 0)).wait()

            drain(num_units - 2)
            drain(num_units - 1)

    # ------------------------------------------------------------------ what there is to do

    def _visit(self, unit: Any) -> Visit:
        begin = lax.div(unit, self._tile.head_groups) * VISIT_FIELDS
        row, number, first, end, start, context = (self._scalars.visits[begin + i] for i in range(VISIT_FIELDS))
        token = number * self._tile.queries
        first_query = start + jnp.maximum(token, first) - first
        last_query = start + jnp.minimum(token + self._tile.queries, end) - 1 - first
        return Visit(row, token, first, end, start, context, first_query, last_query)

    def _group(self, unit: Any) -> Any:
        """The group of kv heads of a unit."""
        return lax.rem(unit, self._tile.head_groups)

    def _head(self, unit: Any) -> Any:
        """The first kv head of a unit."""
        return self._group(unit) * self._tile.heads

    def _is_whole(self, visit: Visit) -> Any:
        """Whether all tokens of the tile are the row's, so that what was in the outputs does not matter."""
        return (visit.begin <= visit.token) & (visit.token + self._tile.queries <= visit.end)

    def _whole_stream(self, visit: Visit) -> Stretch:
        """All keys of a visit."""
        block, window = self._tile.block, self._tile.shape.window
        if window is None:
            return Stretch(0, pl.cdiv(visit.last_query + 1, block), 0, visit.last_query + 1, 0, 0)
        first_block = lax.div(first_seen_key(self._tile, visit), block)
        oldest = lax.div(jnp.maximum(visit.start - (window - 1), visit.context), block)
        num_blocks = jnp.maximum(pl.cdiv(visit.start - first_block * block, block), 0)
        size = self._tile.own_tokens
        first_own = jnp.maximum(visit.begin, jnp.maximum(visit.token, visit.begin) - (window - 1))
        own_token = lax.div(first_own, size) * size
        own_end = jnp.minimum(visit.token + self._tile.queries, visit.end)
        return Stretch(
            first_block - oldest, num_blocks, first_block * block, visit.start,
            own_token, pl.cdiv(own_end - own_token, size),
        )  # fmt: skip

    def _num_stretches(self, visit: Visit) -> Any:
        if self._tile.one_pass:
            return 1
        stream, held = self._whole_stream(visit), self._tile.held_keys
        pool = pl.cdiv(stream.num_blocks * self._tile.block, held)
        return pool + pl.cdiv(stream.num_own * self._tile.own_tokens, held) if self._tile.reads_own else pool

    def _stretch(self, unit: Any, number: Any) -> Stretch:
        """The keys of a unit that are held in its ``number``-th stretch."""
        stream = self._whole_stream(self._visit(unit))
        if self._tile.one_pass:
            return stream
        blocks = self._tile.held_keys // self._tile.block
        from_pool = Stretch(
            stream.column + number * blocks,
            jnp.clip(stream.num_blocks - number * blocks, 0, blocks),
            stream.position + number * self._tile.held_keys,
            stream.pool_end, 0, 0,
        )  # fmt: skip
        if not self._tile.reads_own:
            return from_pool
        copies = self._tile.held_keys // self._tile.own_tokens
        later = jnp.maximum(number - pl.cdiv(stream.num_blocks, blocks), 0)
        of_own = jnp.clip(stream.num_own - later * copies, 0, copies)
        is_pool = number < pl.cdiv(stream.num_blocks, blocks)
        own_token = stream.own_token + later * self._tile.held_keys
        return from_pool._replace(own_token=own_token, num_own=jnp.where(is_pool, 0, of_own))

    # ------------------------------------------------------------------ the loops

    def _unit(self, unit: Any, place: Any, num_units: Any) -> Any:
        visit, scratch = self._visit(unit), self._scratch
        parity = lax.rem(unit, 2)

        @pl.when(unit + 1 < num_units)
        def _start() -> None:
            self._start_table(unit + 1)
            self._start_queries(unit + 1)

        self._query_copy(unit).wait()
        self._work.begin(parity)
        num_stretches = self._num_stretches(visit)

        def one(number: Any, place: Any) -> Any:
            is_last = number + 1 == num_stretches

            @pl.when(jnp.logical_not(is_last))
            def _next_stretch() -> None:
                self._start_kv(unit, self._stretch(unit, number + 1), 1 - place)

            @pl.when(is_last & (unit + 1 < num_units))
            def _next_unit() -> None:
                self._wait_table(unit + 1)
                self._start_kv(unit + 1, self._stretch(unit + 1, 0), 1 - place)

            stretch = self._stretch(unit, number)
            self._wait_kv(stretch, place)
            self._work.attend(visit, stretch, place, self._head(unit), is_first=number == 0)
            return 1 - place

        place = one(0, place) if self._tile.one_pass else lax.fori_loop(0, num_stretches, one, place)
        self._store(unit, visit, scratch.outputs.at[parity])
        return place

    def _store(self, unit: Any, visit: Visit, here_ref: Any) -> None:
        """Sends a unit's outputs; where other rows have tokens in the tile, around what these have there."""
        before = jnp.maximum(unit - 2, 0)

        @pl.when((unit >= 2) & self._is_whole(self._visit(before)))
        def _free() -> None:
            self._output_copy(before).wait()

        is_whole = self._is_whole(visit)

        @pl.when(is_whole)
        def _all() -> None:
            self._work.finish(here_ref, self._head(unit), None)
            self._output_copy(unit).start()

        @pl.when(jnp.logical_not(is_whole))
        def _part() -> None:
            # Only whole tiles are on their way while this one is read, and none of them is this one.
            there, copied = self._output_window(unit), self._scratch.stored.at[lax.rem(unit, 2)]
            old = pltpu.make_async_copy(there, here_ref, copied)
            old.start()
            old.wait()
            token = visit.token + lax.broadcasted_iota(jnp.int32, (self._tile.queries, 1), 0)
            self._work.finish(here_ref, self._head(unit), (token >= visit.begin) & (token < visit.end))
            new = self._output_copy(unit)
            new.start()
            new.wait()

    # ------------------------------------------------------------------ copies

    def _start_table(self, unit: Any) -> None:
        if not self._tile.reads_own:
            self._table_copy(unit).start()

    def _wait_table(self, unit: Any) -> None:
        if not self._tile.reads_own:
            self._table_copy(unit).wait()

    def _table_copy(self, unit: Any) -> Any:
        place, row = lax.rem(unit, 2), self._visit(unit).row
        return pltpu.make_async_copy(
            self._arrays.tables.at[row], self._scratch.table.at[place], self._scratch.fetched_table.at[place]
        )

    def _start_queries(self, unit: Any) -> None:
        self._query_copy(unit).start()

    def _query_copy(self, unit: Any) -> Any:
        parity, lanes = lax.rem(unit, 2), self._tile.heads * self._tile.group * self._tile.query_lanes
        there = self._arrays.queries.at[self._tokens(unit), self._lanes(unit, lanes)]
        return pltpu.make_async_copy(there, self._scratch.queries.at[parity], self._scratch.fetched_queries.at[parity])

    def _output_window(self, unit: Any) -> Any:
        lanes = self._tile.heads * self._tile.group * self._tile.output_lanes
        return self._arrays.outputs.at[self._tokens(unit), self._lanes(unit, lanes)]

    def _output_copy(self, unit: Any) -> Any:
        parity = lax.rem(unit, 2)
        here, copied = self._scratch.outputs.at[parity], self._scratch.stored.at[parity]
        return pltpu.make_async_copy(here, self._output_window(unit), copied)

    def _tokens(self, unit: Any) -> Any:
        token = self._visit(unit).token
        return pl.ds(pl.multiple_of(token, self._tile.queries), self._tile.queries)

    def _lanes(self, unit: Any, lanes: int) -> Any:
        return pl.ds(pl.multiple_of(lax.rem(unit, self._tile.head_groups) * lanes, lanes), lanes)

    def _start_kv(self, unit: Any, stretch: Stretch, place: Any) -> None:
        visit = self._visit(unit)

        def block(number: Any, _: None) -> None:
            column = stretch.column + number
            if self._tile.reads_own:
                page = self._scalars.tables[visit.row * self._table_width + column]
            else:
                page = self._scratch.table[lax.rem(unit, 2), lax.div(column, LANES), lax.rem(column, LANES)]
            for copy in self._block_copies(page + self._scalars.layer[0], self._group(unit), number, place):
                copy.start()

        lax.fori_loop(0, stretch.num_blocks, block, None)

        def own(number: Any, _: None) -> None:
            for copy in self._own_copies(self._head(unit), stretch, number, place):
                copy.start()

        if self._tile.reads_own:
            lax.fori_loop(0, stretch.num_own, own, None)
            self._of_own_scales(self._group(unit), stretch, place, lambda copy: copy.start())

    def _of_own_scales(self, group: Any, stretch: Stretch, place: Any, act: Callable[[Any], None]) -> None:
        copies = self._scales.own_copies(group, stretch, place)
        if copies:

            @pl.when(stretch.num_own > 0)
            def _act() -> None:
                for copy in copies:
                    act(copy)

    def _wait_kv(self, stretch: Stretch, place: Any) -> None:
        def block(number: Any, _: None) -> None:
            for copy in self._block_copies(0, 0, number, place):
                copy.wait()

        lax.fori_loop(0, stretch.num_blocks, block, None)
        if self._tile.reads_own:
            self._of_own_scales(0, stretch, place, lambda copy: copy.wait())

            def own(number: Any, _: None) -> None:
                for copy in self._own_copies(0, stretch, number, place):
                    copy.wait()

            lax.fori_loop(0, stretch.num_own, own, None)

    def _block_copies(self, page: Any, group: Any, number: Any, place: Any) -> list[Any]:
        rows = pl.ds(pl.multiple_of(number * self._tile.block, self._tile.block), self._tile.block)
        keys = pltpu.make_async_copy(
            self._arrays.pages.at[page, pl.ds(group * self._tile.planes, self._tile.planes)],
            self._scratch.kv.at[place, :, rows, :],
            self._scratch.fetched_kv.at[place],
        )
        return [keys, *self._scales.block_copies(page, group, number, place)]

    def _own_copies(self, head: Any, stretch: Stretch, number: Any, place: Any) -> list[Any]:
        """Copies of one stretch of the step's own tokens, one a plane."""
        size, pages = self._tile.own_tokens, self._tile.shape.pages
        tokens = pl.ds(pl.multiple_of(stretch.own_token + number * size, size), size)
        aligned = math.gcd(size, self._tile.block)
        rows = pl.ds(pl.multiple_of(stretch.num_blocks * self._tile.block + number * size, aligned), size)
        copies = []
        for own_ref, planes, first in zip(
            self._arrays.own, (pages.key_planes, pages.value_planes), (0, pages.key_planes), strict=False
        ):
            for index in range(self._tile.heads * planes):
                lane = pl.multiple_of((head * planes + index) * LANES, LANES)
                plane = index // planes * pages.planes_per_head + first + index % planes
                copies.append(
                    pltpu.make_async_copy(
                        own_ref.at[tokens, pl.ds(lane, LANES)],
                        self._scratch.kv.at[place, plane, rows, :],
                        self._scratch.fetched_kv.at[place],
                    )
                )
        return copies


class _StretchWork:
    """The products and the softmax of one unit."""

    def __init__(self, tile: PrefillTile, sinks_ref: Any, scratch: Scratch, scales: NoStretchScales) -> None:
        self._tile, self._sinks, self._scratch, self._scales = tile, sinks_ref, scratch, scales

    def begin(self, parity: Any) -> None:
        """Lays the queries of a unit out in rows of scores, (query head, token), where they do not lie so."""
        tile = self._tile
        self._parity = parity
        if tile.packed or self._scratch.queries.dtype != tile.compute_dtype:
            for head in range(tile.heads):
                self._scratch.rows[head] = self._laid_out(head).astype(tile.compute_dtype)

    def _queries_of(self, head: int) -> jax.Array:
        is_copied = self._tile.packed or self._scratch.queries.dtype != self._tile.compute_dtype
        return self._scratch.rows[head] if is_copied else self._laid_out(head)

    def _laid_out(self, head: int) -> jax.Array:
        """[R, key lanes] of a kv head."""
        tile, queries_ref = self._tile, self._scratch.queries
        first, width = head * tile.group * tile.query_lanes, max(LANES, tile.query_lanes)
        by_lanes = [
            queries_ref[self._parity, :, first + i * width : first + (i + 1) * width]
            for i in range(tile.group * tile.query_lanes // width)
        ]
        return jnp.concatenate([part for pair in by_lanes for part in _halves(pair)] if tile.packed else by_lanes)

    def attend(self, visit: Visit, stretch: Stretch, place: Any, head: Any, is_first: Any) -> None:
        """Adds the keys of a stretch."""
        tile, scratch = self._tile, self._scratch
        pool_keys = stretch.num_blocks * tile.block
        num_tiles = pl.cdiv(pool_keys + stretch.num_own * tile.own_tokens, tile.keys)
        run = tile.plain_tiles
        self._scales.prepare(stretch, place)

        def first_pass(number: Any) -> Any:
            at = pl.multiple_of(number * tile.keys, tile.keys)
            are_plain = Edges(tile, visit, stretch, (at, run * tile.keys)).is_plain

            @pl.when(are_plain)
            def _plain() -> None:
                for i in range(run):
                    self._scores(number + i, (place, i == 0), is_edge=False)

            @pl.when(jnp.logical_not(are_plain))
            def _edge() -> None:
                edges = Edges(tile, visit, stretch, (at, tile.keys))

                @pl.when(edges.has_others)
                def _others() -> None:
                    self._clear(edges, place)

                # Read back for each head: masks kept in registers would be computed again for each.
                scratch.bias[...] = jnp.where(edges.seen(), 0.0, softmax.MASKED)
                self._scores(number, (place, True), is_edge=True)

            return number + jnp.where(are_plain, run, 1)

        lax.while_loop(lambda number: number < num_tiles, first_pass, jnp.int32(0))
        self._join_maxima(head, is_first)
        run_2 = tile.weighed_tiles
        num_runs = lax.div(num_tiles, run_2)

        def second_pass(turn: Any, _: None) -> None:
            for i in range(run_2):
                self._weigh(turn * run_2 + i, (place, i == 0))

        lax.fori_loop(0, num_runs, second_pass, None)
        if run_2 > 1:
            lax.fori_loop(num_runs * run_2, num_tiles, lambda number, _: self._weigh(number, (place, True)), None)

    def _keys_of(self, head: int, number: Any, place: Any, values: bool) -> jax.Array:
        """Keys or values of a head in a tile, [N, lanes]."""
        tile, pages = self._tile, self._tile.shape.pages
        first = pages.first_value_plane(head) if values else pages.first_key_plane(head)
        count = pages.value_planes if values else pages.key_planes
        rows = pl.ds(pl.multiple_of(number * tile.keys, tile.keys), tile.keys)
        planes = [self._scratch.kv[place, first + i, rows, :] for i in range(count)]
        joined = planes[0] if count == 1 else jnp.concatenate(planes, axis=1)
        return joined.astype(tile.compute_dtype)

    def _scores(self, number: Any, where: tuple[Any, bool], is_edge: bool) -> None:
        """Scores of a tile, in powers of two; ``where``: the place of its keys, and whether it may be the first."""
        tile, scratch, cap = self._tile, self._scratch, self._tile.shape.soft_cap
        parts = tile.keys // LANES
        place, may_be_first = where
        for head in range(tile.heads):
            products = softmax.scores(self._queries_of(head), self._keys_of(head, number, place, values=False))
            products = self._scales.of_keys(head, number, products)
            if cap is None:
                products = products * (tile.shape.scale * LOG2_E)
            else:
                products = jnp.tanh(products * (tile.shape.scale / cap)) * (cap * LOG2_E)
            if is_edge:
                products += jnp.concatenate([scratch.bias[...]] * tile.group, axis=0)
            lanes = [products[:, i * LANES : (i + 1) * LANES] for i in range(parts)]
            for i, part in enumerate(lanes):
                scratch.scores[head, number * parts + i] = part
            so_far = scratch.lane_maxima[head]
            if may_be_first:
                so_far = jnp.where(number == 0, softmax.MASKED, so_far)
            scratch.lane_maxima[head] = _fold(jnp.maximum, [so_far, *lanes])

    def _join_maxima(self, head: Any, is_first: Any) -> None:
        """The maximum of each row over all its keys, and what is summed so far made relative to it."""
        tile, scratch = self._tile, self._scratch
        for index in range(tile.heads):
            joined = jnp.max(scratch.lane_maxima[index], axis=1, keepdims=True)
            new = jnp.broadcast_to(joined, (tile.rows, LANES))
            if tile.one_pass:
                scratch.maxima[index] = new if self._sinks is None else jnp.maximum(new, self._sink_rows(head, index))
                continue
            lowest = jnp.full_like(new, softmax.MASKED) if self._sinks is None else self._sink_rows(head, index)
            old = jnp.where(is_first, lowest, scratch.maxima[index])
            new = jnp.maximum(new, old)
            shrink = jnp.where(is_first, 0.0, jnp.exp2(old - new))
            scratch.maxima[index] = new
            # What an accumulator holds before the first stretch is not a number that could be shrunk.
            sums, weighted = scratch.sums[index], scratch.weighted[index]
            scratch.sums[index] = jnp.where(is_first, 0.0, sums) * shrink
            wide = jnp.concatenate([shrink] * tile.shape.pages.value_planes, axis=1)
            scratch.weighted[index] = jnp.where(is_first, 0.0, weighted) * wide

    def _sink_rows(self, head: Any, index: int) -> jax.Array:
        """The sinks as scores of a kv head's rows, f32[R, 128]."""
        tile = self._tile
        first = (head + index) * tile.group
        scores = [self._sinks[first + g] * LOG2_E for g in range(tile.group)]
        return jnp.concatenate([jnp.full((tile.queries, LANES), score, jnp.float32) for score in scores], axis=0)

    def _weigh(self, number: Any, where: tuple[Any, bool]) -> None:
        """Adds a tile to the sums; ``where`` as of ``_scores``."""
        tile, scratch = self._tile, self._scratch
        place, may_be_first = where
        parts = tile.keys // LANES
        for head in range(tile.heads):
            maxima = scratch.maxima[head]
            scores = [scratch.scores[head, number * parts + i] for i in range(parts)]
            weights = [jnp.exp2(part - maxima) for part in scores]
            sums, weighted = scratch.sums[head], scratch.weighted[head]
            if tile.one_pass and may_be_first:
                sums, weighted = (jnp.where(number == 0, 0.0, x) for x in (sums, weighted))
            scratch.sums[head] = _fold(jnp.add, [sums, *weights])
            values = self._keys_of(head, number, place, values=True)
            of_values = self._scales.of_values(head, number, jnp.concatenate(weights, axis=1))
            scratch.weighted[head] = weighted + softmax.weighted_sum(of_values, values)

    def _clear(self, edges: Edges, place: Any) -> None:
        """What is no key of the row becomes 0: it may be NaN, which neither a bias nor a weight of 0 would mask."""
        if self._tile.scaled:
            # Integers are numbers, whatever lies there, and scales of 0 make them 0.
            self._scales.clear(lax.div(edges.first, self._tile.keys), edges.positions(1) != NOT_A_KEY)
            return
        rows = pl.ds(edges.first, self._tile.keys)
        is_key = edges.positions(0) != NOT_A_KEY
        for index in range(self._tile.planes):
            plane = self._scratch.kv.at[place, index, rows, :]
            plane[...] = jnp.where(is_key, plane[...].astype(jnp.float32), 0.0).astype(plane.dtype)

    def finish(self, outputs_ref: Any, head: Any, mine: jax.Array | None) -> None:
        """Divides by the sums and lays the outputs out by token; where ``mine`` says no, what was there stays."""
        tile, scratch = self._tile, self._scratch
        for index in range(tile.heads):
            total = jnp.sum(scratch.sums[index], axis=1, keepdims=True)
            if self._sinks is not None:
                relative = (self._sink_rows(head, index) - scratch.maxima[index])[:, :1]
                total += jnp.exp2(relative)
            results = scratch.weighted[index] * (1.0 / total)
            by_head = [results[g * tile.queries : (g + 1) * tile.queries] for g in range(tile.group)]
            if tile.packed:
                by_head = [_side_by_side(low, high) for low, high in zip(by_head[::2], by_head[1::2], strict=True)]
            width = by_head[0].shape[1]
            for g, result in enumerate(by_head):
                lanes = slice((index * len(by_head) + g) * width, (index * len(by_head) + g + 1) * width)
                if mine is not None:
                    result = jnp.where(mine, result, outputs_ref[:, lanes].astype(jnp.float32))
                outputs_ref[:, lanes] = result.astype(outputs_ref.dtype)


def _fold(combine: Callable[[jax.Array, jax.Array], jax.Array], parts: Sequence[jax.Array]) -> jax.Array:
    """All parts combined, as a tree so that few wait for few."""
    while len(parts) > 1:
        pairs = [combine(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + list(parts[2 * len(pairs) :])
    return parts[0]


def _halves(both: jax.Array) -> list[jax.Array]:
    """Two heads' queries from one row of lanes, each in the lower half, where keys are; zeros meet the values."""
    both = both.astype(jnp.float32)
    is_low = lax.broadcasted_iota(jnp.int32, both.shape, 1) < HALF
    return [jnp.where(is_low, part, 0.0) for part in (both, pltpu.roll(both, HALF, 1))]


def _side_by_side(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two heads' values, each in the upper half of its lanes, in one row: the first in the lower half."""
    is_low = lax.broadcasted_iota(jnp.int32, low.shape, 1) < HALF
    return jnp.where(is_low, pltpu.roll(low, HALF, 1), high)
