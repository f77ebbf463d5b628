"""Attention over any number of pages: validation, choice of tiles, the call.

Owns: the public functions. Must never: move data that a kernel could leave where it is.

Axis letters: S rows, H query heads, D head dim, C planes of a page.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import vector_memory
from pallas_kernels.decode_inputs import DecodeInputs, check_decode
from pallas_kernels.heads import HeadLayout
from pallas_kernels.paged_attention.kernel import TABLES_HELD, WRITES_HELD, PagedTile, decode_kernel
from pallas_kernels.pages import LANES, AttentionShape, token_planes, write_rows
from pallas_kernels.scales import Arena, arena_of, in_every_slot, pool_views
from pallas_kernels.tiles import paged_tiles
from pallas_kernels.vector_memory import VectorBuffer


def decode(
    shape: AttentionShape, inputs: DecodeInputs, interpret: bool | pltpu.InterpretParams = False
) -> tuple[jax.Array, Arena]:
    """Writes each row's K/V to its slot and attends over all its blocks, or over the window at their end.

    A global row without a slot sees what the pool holds at its own position.

    Returns:
        outputs [S, H, Dv] in the dtype of the queries, 0 for rows of length 0; and the arena, in place.

    Raises:
        ValueError: as ``check_decode`` says.
    """
    check_decode(shape, inputs)
    num_rows = inputs.queries.shape[0]
    tile = decode_tile(shape, jnp.dtype(inputs.keys.dtype), jnp.dtype(inputs.queries.dtype))
    heads, pages, rows = tile.heads, shape.pages, inputs.rows
    pool = pool_views(inputs.arena, pages)
    new_words = [] if inputs.words is None else [in_every_slot(inputs.words, pages)]
    sinks = [] if inputs.sinks is None else [heads.pack_sinks(inputs.sinks)]
    vectors = rows.tables.shape[1]

    def by_row(*dims: int) -> pl.BlockSpec:
        def index(i: jax.Array, _lens: Any, _slots: Any, order: Any, layer_and_live: Any) -> tuple[Any, ...]:
            # Idle rows come last; they stay at the last live one's blocks, so that nothing is moved for them.
            return (order[jnp.minimum(i, jnp.maximum(layer_and_live[1] - 1, 0))], *(0 for _ in dims))

        return pl.BlockSpec((1, *dims), index)

    whole_sinks = [pl.BlockSpec((shape.num_heads, LANES), lambda i, *_: (0, 0)) for _ in sinks]
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    buffers = vector_buffers(tile)
    outputs, *pool = pl.pallas_call(
        decode_kernel(tile, has_sinks=bool(sinks)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_rows,),
            in_specs=[
                by_row(*heads.query_shape),
                by_row(pages.num_planes, LANES),
                *(by_row(*words.shape[1:]) for words in new_words),
                *whole_sinks,
                in_hbm,
                *(in_hbm for _ in pool),
            ],
            out_specs=[by_row(*heads.output_shape), *(in_hbm for _ in pool)],
            scratch_shapes=[
                *vector_memory.allocations(buffers),
                pltpu.SMEM((TABLES_HELD, vectors, LANES), jnp.int32),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.SemaphoreType.DMA((tile.buffers,)),
                pltpu.SemaphoreType.DMA((TABLES_HELD,)),
                pltpu.SemaphoreType.DMA((WRITES_HELD,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_rows, *heads.output_shape), inputs.queries.dtype),
            *(jax.ShapeDtypeStruct(view.shape, view.dtype) for view in pool),
        ],
        input_output_aliases={7 + len(new_words) + len(sinks) + i: 1 + i for i in range(len(pool))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vector_memory.limit(buffers),
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="paged_decode",
    )(
        rows.kv_lens,
        rows.slots,
        rows.order,
        jnp.stack([inputs.layer, jnp.sum(rows.kv_lens > 0, dtype=jnp.int32)]),
        heads.pack_queries(inputs.queries),
        token_planes(inputs.keys, inputs.values, pages),
        *new_words,
        *sinks,
        rows.tables,
        *pool,
    )
    outputs = jnp.where((rows.kv_lens > 0)[:, None, None], outputs, jnp.zeros_like(outputs))
    return heads.unpack_outputs(outputs), arena_of(pool, inputs.arena)


def vector_buffers(tile: PagedTile) -> list[VectorBuffer]:
    """What the kernel holds: tiles of blocks, rows to write, and a row's maxima, totals and sums so far."""
    lanes = (LANES, LANES, tile.heads.output_shape[1])
    running = [VectorBuffer((tile.shape.num_heads, count), jnp.dtype(jnp.float32)) for count in lanes]
    return [*tile.block_buffers(tile.buffers, tile.blocks), *tile.write_buffers(WRITES_HELD), *running]


def decode_tile(shape: AttentionShape, dtype: jnp.dtype, query_dtype: jnp.dtype) -> PagedTile:
    """The static plan of a step: ``dtype`` is the pool's."""
    tiles = paged_tiles(shape, dtype)
    heads = HeadLayout(shape, tiles.heads_per_product)
    return PagedTile(heads, dtype, query_dtype, write_rows(dtype), blocks=tiles.blocks, buffers=tiles.buffers)
