"""The attention kernels that come with jax, set up on our shapes, and their trip counts as their sources give them.

Neither skips what left a window. The ragged kernel masks it; the paged one knows no window, so its output would be
wrong, and its cost is that of reading everything. Lengths are the context and the mean of a block of tokens more.

Owns: arguments and models of the peers. Must never: tune them beyond the tile sizes that it states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tools.tpu_costs.cases import Case
from tools.tpu_costs.measured import Work
from tools.tpu_costs.schedule import Schedule
from tools.tpu_costs.trips import Counts, first_fetch, largest, walk

POOL_TOKENS = 1 << 16
TILE_TOKENS = 1024
QUERIES_A_BLOCK = 8


def _tile_pages(case: Case) -> int:
    window = case.geometry.window
    tokens = min(TILE_TOKENS, window or TILE_TOKENS)
    return max(1, tokens // case.block_size)


def _table_width(case: Case) -> int:
    """Pages of the longest sequence, a whole number of tiles."""
    tile = _tile_pages(case)
    return -(-(case.context + case.block_size) // case.block_size // tile) * tile + tile


def _mean_tiles(case: Case, tile_tokens: int) -> float:
    """Tiles that lengths spread over one block take on average."""
    block = case.block_size
    return sum(-(-(case.context + extra) // tile_tokens) for extra in range(1, block + 1)) / block


def floor_bytes(case: Case) -> float:
    """K and V of the window or the context, of each sequence, and the query and output of each token."""
    geometry = case.geometry
    length = case.context + case.block_size / 2
    seen = length if geometry.window is None else min(length, geometry.window)
    return case.batch * (seen * geometry.token_bytes + 2 * case.chunk * geometry.query_bytes)


def ragged(case: Case, struct: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``ragged_paged_attention``: the function and the shapes of its arguments."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    geometry, tokens = case.geometry, case.batch * case.chunk
    tile = case.options.get("tile_pages", _tile_pages(case))
    function = functools.partial(
        kernel.ragged_paged_attention,
        sm_scale=geometry.head_dim**-0.5,
        sliding_window=geometry.window,
        num_kv_pages_per_block=tile,
        num_queries_per_block=case.options.get("queries", QUERIES_A_BLOCK if case.chunk == 1 else 128),
        vmem_limit_bytes=case.options.get("vmem_limit", 64 << 20),
    )
    pages = POOL_TOKENS // case.block_size
    return function, (
        struct((tokens, geometry.q_heads, geometry.head_dim), "bfloat16"),
        struct((pages, case.block_size, 2 * geometry.kv_heads, geometry.head_dim), geometry.dtype),
        struct((case.batch,), "int32"),
        struct((case.batch, _table_width(case)), "int32"),
        struct((case.batch + 1,), "int32"),
        struct((1,), "int32"),
    )


def ragged_work(case: Case, schedule: Schedule) -> Work:
    """Grid over blocks of queries; in it a loop over the sequences of the block; in it one over KV tiles."""
    queries = case.options.get("queries", QUERIES_A_BLOCK if case.chunk == 1 else 128)
    tile_tokens = case.options.get("tile_pages", _tile_pages(case)) * case.block_size
    grid = largest(schedule.code.loops)
    sequences = largest(grid.loops)
    tiles = largest(sequences.loops)
    programs = -(-case.batch * case.chunk // queries)
    turns = _mean_tiles(case, tile_tokens)
    counts = Counts.of(schedule)
    counts.repeat(grid, programs)
    per_program = max(1.0, case.batch / programs)
    counts.repeat(sequences, per_program)
    counts.repeat(tiles, turns)
    prologue = first_fetch(schedule, grid)
    if prologue:
        counts.rarely(prologue, 1 / programs)
    moved = programs * per_program * turns * tile_tokens * case.geometry.token_bytes
    io = 2 * case.batch * case.chunk * case.geometry.query_bytes
    fill = tile_tokens * case.geometry.token_bytes
    return Work(counts, moved + io, floor_bytes(case), fill, (tiles,))


def paged(case: Case, struct: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``paged_attention``: one token a sequence, no window."""
    from jax.experimental.pallas.ops.tpu import paged_attention as module

    geometry = case.geometry
    function = functools.partial(module.paged_attention, pages_per_compute_block=_tile_pages(case))
    pool = struct(
        (geometry.kv_heads, POOL_TOKENS // case.block_size, case.block_size, geometry.head_dim), geometry.dtype
    )
    return function, (
        struct((case.batch, geometry.q_heads, geometry.head_dim), "bfloat16"),
        pool,
        pool,
        struct((case.batch,), "int32"),
        struct((case.batch, _table_width(case)), "int32"),
    )


def paged_work(case: Case, schedule: Schedule) -> Work:
    """Grid over sequences and kv heads; in it a loop over KV tiles; the loops in that look for the next sequence."""
    tile_tokens = _tile_pages(case) * case.block_size
    grid = largest(schedule.code.loops)
    tiles = largest(grid.loops)
    counts = Counts.of(schedule)
    programs = case.batch * case.geometry.kv_heads
    turns = _mean_tiles(case, tile_tokens)
    counts.repeat(grid, programs)
    counts.repeat(tiles, turns)
    # They turn only past sequences of no tokens.
    walk(tiles, lambda loop: counts.repeat(loop, 0))
    prologue = first_fetch(schedule, tiles)
    if prologue:
        counts.rarely(prologue, 1 / (programs * turns))
    moved = case.batch * turns * tile_tokens * case.geometry.token_bytes
    io = 2 * case.batch * case.geometry.query_bytes
    fill = tile_tokens * case.geometry.token_bytes / case.geometry.kv_heads
    return Work(counts, moved + io, floor_bytes(case), fill, (tiles,))
