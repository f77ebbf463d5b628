"""Windowed attention of a step: validation, choice of tiles, the call.

Owns: the public functions. Must never: move data that a kernel could leave where it is.

Axis letters: S rows, H query heads, K kv heads, D head dim, M columns of a table row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import vector_memory
from pallas_kernels.decode_inputs import DecodeInputs, check_decode
from pallas_kernels.heads import HeadLayout
from pallas_kernels.paged_attention.ops import decode as paged_decode
from pallas_kernels.pages import LANES, NO_SLOT, AttentionShape, token_planes, write_rows
from pallas_kernels.rows import in_vectors
from pallas_kernels.scales import Arena, arena_of, in_every_slot, pool_views
from pallas_kernels.tiles import window_tiles
from pallas_kernels.vector_memory import VectorBuffer
from pallas_kernels.windowed_attention.kernel import WindowTile, decode_kernel

MOST_TABLE_ENTRIES = 2**17
"""Half of the scalar memory."""


def decode(
    shape: AttentionShape, inputs: DecodeInputs, interpret: bool | pltpu.InterpretParams = False
) -> tuple[jax.Array, Arena]:
    """Writes each row's K/V to its slot and attends over its window.

    A row without a slot sees its own K/V all the same. Tables are in scalar memory, so there may be at most
    ``MOST_TABLE_ENTRIES / M`` rows: 7,710 of a window of 1,024 in blocks of 64. A window too large to be held twice is
    read in tiles, by paged decode, whose tables stay in HBM.

    Returns:
        outputs [S, H, Dv] in the dtype of the queries, 0 for rows of length 0; and the arena, in place.

    Raises:
        ValueError: as ``check_decode`` says, or there are too many rows.
    """
    check_decode(shape, inputs)
    tile = decode_tile(shape, jnp.dtype(inputs.keys.dtype), jnp.dtype(inputs.queries.dtype), inputs.queries.shape[0])
    if tile is None:
        tables = in_vectors(inputs.rows.tables)
        return paged_decode(shape, inputs._replace(rows=inputs.rows._replace(tables=tables)), interpret)
    if inputs.rows.tables.size > MOST_TABLE_ENTRIES:
        num_rows, width = inputs.rows.tables.shape
        raise ValueError(
            f"{num_rows} rows with tables of {width} entries; at most {MOST_TABLE_ENTRIES // width} rows fit scalar "
            "memory"
        )
    asked = inputs.queries.shape[0]
    inputs = _padded(inputs, -asked % tile.sequences)
    num_rows = inputs.queries.shape[0]
    heads, pages = tile.heads, shape.pages
    pool = pool_views(inputs.arena, pages)
    new_rows = token_planes(inputs.keys, inputs.values, pages)
    new_words = [] if inputs.words is None else [in_every_slot(inputs.words, pages)]
    sinks = [] if inputs.sinks is None else [heads.pack_sinks(inputs.sinks)]

    def by_program(*dims: int) -> pl.BlockSpec:
        return pl.BlockSpec((tile.sequences, *dims), lambda i, *_: (i, *(0 for _ in dims)))

    whole_sinks = [pl.BlockSpec((shape.num_heads, LANES), lambda i, *_: (0, 0)) for _ in sinks]
    in_pool = pl.BlockSpec(memory_space=pl.ANY)
    buffers = vector_buffers(tile)
    output_shape = jax.ShapeDtypeStruct((num_rows, *heads.output_shape), inputs.queries.dtype)
    outputs, *pool = pl.pallas_call(
        decode_kernel(tile, num_rows, has_sinks=bool(sinks)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_rows // tile.sequences,),
            in_specs=[
                by_program(*heads.query_shape),
                by_program(pages.num_planes, LANES),
                *(by_program(*words.shape[1:]) for words in new_words),
                *whole_sinks,
                *(in_pool for _ in pool),
            ],
            out_specs=[by_program(*heads.output_shape), *(in_pool for _ in pool)],
            scratch_shapes=[
                *vector_memory.allocations(buffers),
                pltpu.SemaphoreType.DMA((tile.sequences, tile.turns)),
                pltpu.SemaphoreType.DMA,
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[output_shape, *(jax.ShapeDtypeStruct(view.shape, view.dtype) for view in pool)],
        input_output_aliases={6 + len(new_words) + len(sinks) + i: 1 + i for i in range(len(pool))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vector_memory.limit(buffers),
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="windowed_decode",
    )(
        inputs.rows.tables.reshape(-1),
        inputs.rows.kv_lens,
        inputs.rows.slots,
        inputs.layer.reshape(1),
        heads.pack_queries(inputs.queries),
        new_rows,
        *new_words,
        *sinks,
        *pool,
    )
    return heads.unpack_outputs(outputs)[:asked], arena_of(pool, inputs.arena)


def vector_buffers(tile: WindowTile) -> list[VectorBuffer]:
    """What the kernel holds, as its body takes it: the blocks of each place, the scales of each, and rows to write."""
    of_a_place = tile.block_buffers(tile.turns, tile.fetched_blocks)
    return [buffer for buffer in of_a_place for _ in range(tile.sequences)] + tile.write_buffers(tile.sequences)


def _padded(inputs: DecodeInputs, count: int) -> DecodeInputs:
    """With ``count`` rows more that do nothing, so that programs are full."""
    if not count:
        return inputs

    def pad(array: jax.Array, value: int = 0) -> jax.Array:
        return jnp.pad(array, ((0, count), *((0, 0) for _ in array.shape[1:])), constant_values=value)

    rows = inputs.rows
    padded = rows._replace(tables=pad(rows.tables), kv_lens=pad(rows.kv_lens), slots=pad(rows.slots, NO_SLOT))
    words = None if inputs.words is None else pad(inputs.words)
    return inputs._replace(
        queries=pad(inputs.queries), keys=pad(inputs.keys), values=pad(inputs.values), rows=padded, words=words
    )


def decode_tile(shape: AttentionShape, dtype: jnp.dtype, query_dtype: jnp.dtype, num_rows: int) -> WindowTile | None:
    """The static plan of a step: ``dtype`` is the pool's. ``None`` where two windows do not fit vector memory."""
    tiles = window_tiles(shape, dtype)
    if tiles is None:
        return None
    tiles = tiles.for_rows(num_rows)
    heads = HeadLayout(shape, tiles.heads_per_product)
    return WindowTile(
        heads,
        dtype,
        query_dtype,
        write_rows(dtype),
        sequences=tiles.sequences,
        together=tiles.together,
        turns=tiles.turns,
    )
