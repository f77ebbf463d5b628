"""Our kernels, set up on a shape, and what they do in a step: trip counts as their sources give them.

Decode: every row is as long as the case says (the mean over a block of tokens), so the paths of short rows do not run.

Owns: arguments and models of ``pallas_kernels``. Must never: import jax when it is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tools.tpu_costs.cases import LANES, Case, Geometry
from tools.tpu_costs.measured import Work
from tools.tpu_costs.schedule import Loop, Schedule
from tools.tpu_costs.trips import Counts, first_fetch, largest

POOL_PAGES, POOL_BYTES = 4096, 4 << 30
"""Of the pool that a kernel is compiled for: fewer pages where they are so large that a chip's memory would end."""


def attention_shape(case: Case) -> Any:
    """The kernels' own description of a case."""
    from pallas_kernels.pages import AttentionShape, PageGeometry

    geometry = case.geometry
    pages = PageGeometry(case.block_size, geometry.kv_heads, geometry.head_dim, geometry.head_dim)
    return AttentionShape(pages, geometry.q_heads, geometry.window, geometry.head_dim**-0.5)


def _decode_inputs(case: Case, struct: Callable[..., Any]) -> Any:
    import jax

    from pallas_kernels.decode_inputs import DecodeInputs
    from pallas_kernels.rows import QueryRows, global_rows, windowed_rows

    geometry, shape = case.geometry, attention_shape(case)
    batch, dim = case.batch, geometry.head_dim
    is_windowed = geometry.window is not None
    columns = shape.table_width if is_windowed else -(-(case.context + case.block_size) // case.block_size)
    make = functools.partial(windowed_rows, shape) if is_windowed else global_rows
    query_rows = QueryRows(**{n: struct((batch,), "bool" if n == "live" else "int32") for n in QueryRows._fields})
    rows = jax.eval_shape(make, struct((batch, columns), "int32"), query_rows)
    rows = jax.tree.map(lambda x: struct(x.shape, x.dtype), rows)
    new, words = new_tokens(case, struct, batch)
    sinks = struct((geometry.q_heads,), "float32") if geometry.sinks else None
    queries = struct((batch, geometry.q_heads, dim), _query_dtype(geometry))
    return DecodeInputs(queries, new, new, arena_of_case(case, struct), struct((), "int32"), rows, sinks, words)


def new_tokens(case: Case, struct: Callable[..., Any], count: int) -> tuple[Any, Any]:
    """Keys (or values) of new tokens in the dtype of the pool, and of int8 the words of their scales, else None."""
    geometry, pages = case.geometry, attention_shape(case).pages
    new = struct((count, geometry.kv_heads, geometry.head_dim), geometry.dtype)
    return new, struct((count, pages.num_planes), "int32") if geometry.dtype == "int8" else None


def pool_rows(case: Case) -> int:
    """Rows of 128 elements of the pool."""
    rows = int(attention_shape(case).pages.rows)
    return rows * min(POOL_PAGES, POOL_BYTES // (rows * LANES * case.geometry.itemsize))


def arena_of_case(case: Case, struct: Callable[..., Any]) -> Any:
    """The pool of a case."""
    from pallas_kernels.scales import ScaledArena

    rows = pool_rows(case)
    values = struct((1, rows, LANES), case.geometry.dtype)
    is_scaled = case.geometry.dtype == "int8"
    return ScaledArena(values, struct((1, rows // LANES, LANES), "int32")) if is_scaled else values


def _with_arena_apart(function: Callable[..., Any], inputs: Any) -> tuple[Any, ...]:
    """The arena as the one argument that is donated."""
    rest = inputs._replace(arena=None)
    return lambda arena, rest: function(rest._replace(arena=arena)), (inputs.arena, rest), (0,)


def _query_dtype(geometry: Geometry) -> str:
    return "float32" if geometry.dtype == "float32" else "bfloat16"


def windowed_decode(case: Case, struct: Callable[..., Any]) -> tuple[Any, ...]:
    """Decode of a windowed layer."""
    from pallas_kernels.windowed_attention import ops

    return _with_arena_apart(functools.partial(ops.decode, attention_shape(case)), _decode_inputs(case, struct))


def paged_decode(case: Case, struct: Callable[..., Any]) -> tuple[Any, ...]:
    """Decode of a global layer."""
    from pallas_kernels.paged_attention import ops

    return _with_arena_apart(functools.partial(ops.decode, attention_shape(case)), _decode_inputs(case, struct))


def windowed_decode_work(case: Case, schedule: Schedule) -> Work:
    """Grid over a few sequences each; every window is full."""
    import jax.numpy as jnp

    from pallas_kernels.tiles import window_tiles

    shape = attention_shape(case)
    tiles = window_tiles(shape, jnp.dtype(case.geometry.dtype))
    if tiles is None:
        return paged_decode_work(case, schedule)
    programs = -(-case.batch // tiles.for_rows(case.batch).sequences)
    if programs < 2:
        least = tiles.sequences + 1
        raise ValueError(f"a batch of {case.batch} is one program, which has no steady state; give {least} or more")
    grid = largest(schedule.code.loops)
    counts = Counts.of(schedule)
    counts.repeat(grid, programs)
    prologue = first_fetch(schedule, grid)
    if prologue:
        counts.rarely(prologue, 1 / programs)
    # Rows shorter than the window wait for their blocks in loops, and clear what they have none for.
    for loop in grid.loops:
        counts.rarely(_around(grid, loop), 0)
    # Programs without a live row only fetch for later ones. The first loop waits for writes before either.
    writes = grid.loops[0]
    attend = max((s for s in grid.skips if s[0] >= writes.end), key=lambda s: s[1] - s[0])
    for start, end in grid.skips:
        if start >= attend[1] and schedule.copies_in(start, end):
            counts.rarely((start, end), 0)
    blocks = _mean_blocks(case)
    fetched = blocks * case.block_size * page_token_bytes(case)
    return _decode_work(case, counts, (fetched, fetched), grid)


def paged_decode_work(case: Case, schedule: Schedule) -> Work:
    """Grid over rows; in it a loop over tiles, of which the last is an edge and mostly not full."""
    import jax.numpy as jnp

    from pallas_kernels.tiles import paged_tiles

    if case.batch < 2:
        raise ValueError("a batch of 1 is one program, which has no steady state; give 2 or more")
    tiles = paged_tiles(attention_shape(case), jnp.dtype(case.geometry.dtype))
    grid = largest(schedule.code.loops)
    turning = largest(grid.loops)
    blocks = _mean_blocks(case)
    turns = _mean_turns(case, tiles.blocks)
    counts = Counts.of(schedule)
    counts.repeat(grid, case.batch)
    counts.repeat(turning, turns)
    prologue = next((s for s in sorted(grid.skips) if s[1] <= turning.start and schedule.copies_in(*s)), None)
    if prologue:
        counts.rarely(prologue, 1 / case.batch)
    part_blocks = (blocks - (turns - 1) * tiles.blocks) if turns > 1 else blocks
    for loop in turning.loops:
        counts.repeat(loop, part_blocks)
        counts.rarely(_around(turning, loop), 1 / turns)
    edges = 1 if case.geometry.window is None else min(2, turns)
    edge, inner = _products(schedule, turning)[:2]
    counts.rarely(edge, edges / turns)
    counts.rarely(inner, 1 - edges / turns)
    fetched = blocks * case.block_size * page_token_bytes(case)
    first = min(blocks, tiles.blocks) * case.block_size * page_token_bytes(case)
    return _decode_work(case, counts, (fetched, first), turning)


def page_token_bytes(case: Case) -> float:
    """Bytes of one token in a page, padding to the lanes included, and the scales of int8."""
    pages, geometry = attention_shape(case).pages, case.geometry
    return pages.num_planes * (128 * geometry.itemsize + (4 if geometry.dtype == "int8" else 0))


def _decode_work(case: Case, counts: Counts, fetched: tuple[float, float], hot: Loop) -> Work:
    """``fetched`` bytes of a sequence's blocks, and those of them that come before anything is computed."""
    import jax.numpy as jnp

    from pallas_kernels.pages import SMALLEST_WRITE_ROWS, row_tile

    geometry = case.geometry
    length = case.context + case.block_size / 2
    seen = length if geometry.window is None else min(length, geometry.window)
    io = 2 * geometry.query_bytes
    new = page_token_bytes(case)
    # As pages.write_rows has it, which asks the mesh of a trace.
    by_dtype = case.topology.startswith("tpu7x") or geometry.itemsize == 1
    written = (row_tile(jnp.dtype(geometry.dtype)) if by_dtype else SMALLEST_WRITE_ROWS) * new
    if geometry.dtype == "int8":
        # The words of a page go back whole, and come in repeated for every slot.
        pages = attention_shape(case).pages
        written += 4 * pages.num_planes * (2 * pages.block_size - row_tile(jnp.dtype(geometry.dtype)))
    floor = case.batch * (seen * geometry.token_bytes + io + 2 * geometry.token_bytes)
    return Work(counts, case.batch * (fetched[0] + io + new + written), floor, fetched[1], (hot,))


def _mean_blocks(case: Case) -> float:
    """Blocks that lengths spread over one block take on average; a window never more than its table has."""
    block, window = case.block_size, case.geometry.window
    lengths = range(case.context + 1, case.context + block + 1)
    firsts = (0 if window is None else max(0, n - window) // block for n in lengths)
    return sum(-(-n // block) - first for n, first in zip(lengths, firsts, strict=True)) / block


def _mean_turns(case: Case, blocks_of_tile: int) -> float:
    block, window = case.block_size, case.geometry.window
    total = 0
    for n in range(case.context + 1, case.context + block + 1):
        first = 0 if window is None else max(0, n - window) // block
        total += -(-(-(-n // block) - first) // blocks_of_tile)
    return total / block


def _around(outer: Loop, loop: Loop) -> tuple[int, int]:
    """The smallest conditional stretch of ``outer`` around a loop in it; the loop itself where there is none."""
    around = [s for s in outer.skips if s[0] <= loop.start and loop.end <= s[1]]
    return min(around, key=lambda s: s[1] - s[0], default=(loop.start, loop.end))


def _products(schedule: Schedule, loop: Loop) -> list[tuple[int, int]]:
    """The conditional stretches of a loop that use the matrix unit, those within others left out, in their order."""
    using = [s for s in sorted(loop.skips) if schedule.slots[s[0] : s[1], 0].any()]
    return [s for s in using if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in using)]
