"""Our prefill kernels, set up on a shape, and what they do for one chunk: trip counts as their sources give them.

The chunk is one row that begins at token 0 of the step and at position ``context``. How many tiles of each kind its
query tiles visit is counted one by one.

Owns: arguments and models. Must never: import jax when it is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from tools.tpu_costs.cases import Case
from tools.tpu_costs.measured import Work
from tools.tpu_costs.our_kernels import arena_of_case, attention_shape, new_tokens, page_token_bytes
from tools.tpu_costs.schedule import UNITS, Loop, Schedule
from tools.tpu_costs.trips import Counts, largest

ROWS = 8


def _dtypes(case: Case) -> tuple[Any, Any]:
    import jax.numpy as jnp

    queries = "float32" if case.geometry.dtype == "float32" else "bfloat16"
    return jnp.dtype(case.geometry.dtype), jnp.dtype(queries)


def plan(case: Case) -> Any:
    """The tile choice of a case, with its options laid over."""
    from pallas_kernels.prefill_attention.tile import choose_tile

    chosen = choose_tile(attention_shape(case), case.chunk, *_dtypes(case))
    return dataclasses.replace(chosen, **case.options)


def _step_tokens(struct: Callable[..., Any]) -> Any:
    from pallas_kernels.prefill_rows import StepTokens

    one, of_rows = struct((), "int32"), struct((ROWS,), "int32")
    return StepTokens(of_rows, of_rows, of_rows, struct((ROWS + 1,), "int32"), one, one)


def prefill(case: Case, struct: Callable[..., Any]) -> tuple[Any, ...]:
    """One chunk of a layer."""
    import jax

    from pallas_kernels.prefill_attention import ops
    from pallas_kernels.prefill_rows import prefill_rows

    geometry, shape, tile = case.geometry, attention_shape(case), plan(case)
    _, query_dtype = _dtypes(case)
    columns = -(-(case.context + case.chunk) // case.block_size) if shape.window is None else shape.table_width
    make = functools.partial(prefill_rows, shape, num_tokens=case.chunk, query_tile=tile.queries)
    rows = jax.eval_shape(make, struct((ROWS, columns), "int32"), _step_tokens(struct))
    rows = jax.tree.map(lambda x: struct(x.shape, x.dtype), rows)
    of_heads = struct((case.chunk, geometry.q_heads, geometry.head_dim), query_dtype)
    new, words = new_tokens(case, struct, case.chunk)
    sinks = struct((geometry.q_heads,), "float32") if geometry.sinks else None
    arena = arena_of_case(case, struct)
    inputs = ops.PrefillInputs(of_heads, new, new, arena, struct((), "int32"), rows, of_heads, sinks, words)
    return functools.partial(ops.run, tile), (inputs,)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What one unit does: blocks and own copies fetched, goes of plain tiles, edge tiles, keys in tiles and needed."""

    blocks: int
    copies: int
    plain_goes: int
    edges: int
    tiles: list[int]
    needed: int


def _units(case: Case, tile: Any) -> Iterator[_Unit]:
    """Each query tile of the chunk."""
    window, block = case.geometry.window, case.block_size
    for token in range(0, case.chunk, tile.queries):
        first, last = case.context + token, case.context + token + tile.queries - 1
        if window is None:
            lowest, pool_end, own, begin = 0, last + 1, 0, 0
        else:
            lowest, pool_end = max(0, first - window + 1), case.context
            own_begin = max(0, token - window + 1) // tile.own_tokens * tile.own_tokens
            own = -(-(token + tile.queries - own_begin) // tile.own_tokens)
            begin = case.context + own_begin
        first_block = lowest // block
        blocks = max(0, -(-(pool_end - first_block * block) // block))
        stretches, plain, edges = [], 0, 0
        for keys, position in _stretches(tile, (blocks * block, own * tile.own_tokens), (first_block * block, begin)):
            count = -(-keys // tile.keys)
            stretches.append(count)
            number = 0
            while number < count:
                low = position(number * tile.keys)
                high = position(min(keys, (number + tile.plain_tiles) * tile.keys) - 1)
                fits = (number + tile.plain_tiles) * tile.keys <= keys
                if fits and high <= first and (window is None or low > last - window):
                    plain, number = plain + 1, number + tile.plain_tiles
                else:
                    edges, number = edges + 1, number + 1
        yield _Unit(blocks, own, plain, edges, stretches, last - lowest + 1)


def _stretches(tile: Any, lengths: tuple[int, int], begins: tuple[int, int]) -> Iterator[tuple[int, Any]]:
    """Keys of each stretch, and the position of its n-th key."""
    pool, own = lengths
    if tile.one_pass:
        yield pool + own, lambda n: begins[0] + n if n < pool else begins[1] + n - pool
        return
    for length, begin in zip(lengths, begins, strict=True):
        for at in range(0, length, tile.held_keys):
            yield min(tile.held_keys, length - at), lambda n, b=begin + at: b + n


def prefill_work(case: Case, schedule: Schedule) -> Work:
    """A loop over units; in it, for a context of several stretches, one over those; in it two over tiles."""
    tile, geometry = plan(case), case.geometry
    units = list(_units(case, tile))
    outer = largest(schedule.code.loops)
    counts = Counts.of(schedule)
    num_units = len(units) * tile.head_groups
    counts.repeat(outer, num_units)
    num_stretches = sum(len(unit.tiles) for unit in units) / len(units)
    inner = outer if tile.one_pass else largest(outer.loops)
    if inner is not outer:
        counts.repeat(inner, num_stretches)
    entries = len(units) * (1 if tile.one_pass else num_stretches)
    scored, *weighed = _loops_with_products(schedule, inner)
    # The step's own keys have more copies a turn than a block.
    copies_a_block = 2 if tile.scaled else 1
    for loop in inner.loops:
        if loop not in (scored, *weighed):
            is_of_blocks = len(schedule.copies_in(loop.start, loop.end)) <= copies_a_block
            moved = sum(unit.blocks for unit in units) if is_of_blocks else _own(units)
            counts.repeat(loop, moved / entries)
    _count_products(counts, (tile, units, entries), (scored, weighed))
    # The row has all tokens of its tiles: none is laid around what others have there.
    whole, partial = sorted(s for s in outer.skips if s[0] >= (inner.end if inner is not outer else scored.end))[-2:]
    assert whole[1] <= partial[0]
    counts.rarely(partial, 0)
    tokens = sum(u.blocks * case.block_size + u.copies * tile.own_tokens for u in units)
    io = 2 * case.chunk * geometry.query_bytes
    needed = sum(unit.needed for unit in units)
    least = min(case.context + 0.0, geometry.window or case.context) + case.chunk
    floor = least * geometry.token_bytes + io
    flops = 4.0 * geometry.q_heads * geometry.head_dim * case.chunk * (geometry.window or case.context + case.chunk / 2)
    first = units[0].blocks * case.block_size * page_token_bytes(case) / tile.head_groups
    visited = sum(sum(unit.tiles) for unit in units) * tile.keys / needed
    return Work(counts, tokens * page_token_bytes(case) + io, floor, first, (scored, *weighed), flops, visited)


def _own(units: list[_Unit]) -> int:
    return sum(unit.copies for unit in units)


def _count_products(counts: Counts, what: tuple[Any, list[_Unit], float], loops: tuple[Loop, list[Loop]]) -> None:
    tile, units, entries = what
    scored, weighed = loops
    plain, edges = (sum(getattr(unit, name) for unit in units) for name in ("plain_goes", "edges"))
    counts.repeat(scored, (plain + edges) / entries)
    with_products = [s for s in sorted(scored.skips) if counts.schedule.slots[s[0] : s[1], UNITS.index("MXU")].any()]
    counts.rarely(with_products[0], plain / (plain + edges))
    counts.rarely(with_products[1], edges / (plain + edges))
    goes = sum(count // tile.weighed_tiles for unit in units for count in unit.tiles)
    rest = sum(count % tile.weighed_tiles for unit in units for count in unit.tiles)
    for loop, turns in zip(weighed, (goes, rest), strict=False):
        counts.repeat(loop, turns / entries)


def _loops_with_products(schedule: Schedule, loop: Loop) -> list[Loop]:
    return [other for other in loop.loops if schedule.slots[other.start : other.end, UNITS.index("MXU")].any()]


def update(case: Case, struct: Callable[..., Any]) -> tuple[Any, ...]:
    """The writes of one chunk."""
    import jax

    from pallas_kernels.kv_update import ops
    from pallas_kernels.kv_update.items import write_items
    from pallas_kernels.scales import NewKV

    pages = attention_shape(case).pages
    slots = struct((case.chunk,), "int32")
    items = jax.eval_shape(functools.partial(write_items, pages), _step_tokens(struct), slots)
    items = jax.tree.map(lambda x: struct(x.shape, x.dtype), items)
    new, words = new_tokens(case, struct, case.chunk)
    arguments = NewKV(new, new, words), arena_of_case(case, struct), struct((), "int32"), items
    return functools.partial(ops.update, pages), arguments, (1,)


def update_work(case: Case, schedule: Schedule) -> Work:
    """A loop over blocks, all of them whole, and two that wait."""
    tokens = case.chunk if case.geometry.window is None else min(case.chunk, case.geometry.window)
    blocks = -(-tokens // case.block_size)
    counts = Counts.of(schedule)
    main = largest(schedule.code.loops)
    for loop in schedule.code.loops:
        counts.repeat(loop, blocks)
    # Whole blocks never pass through VMEM.
    whole, *others = sorted(main.skips)
    for stretch in others:
        if not whole[0] <= stretch[0] < whole[1]:
            counts.rarely(stretch, 0)
    moved = 2 * blocks * case.block_size * page_token_bytes(case)
    return Work(counts, moved, 2 * tokens * case.geometry.token_bytes, 0.0, (main,))
