"""Windowed attention of a step: validation, choice of tiles, the call.

Owns: the public functions. Must never: move data that a kernel could leave where it is.

Axis letters: S rows, H query heads, K kv heads, D head dim, M columns of a table row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_inputs import DecodeInputs, check_decode
from pallas_kernels.heads import HeadLayout
from pallas_kernels.pages import LANES, AttentionShape, as_pages, token_planes
from pallas_kernels.windowed_attention.kernel import WindowTile, decode_kernel


def decode(
    shape: AttentionShape, inputs: DecodeInputs, interpret: bool | pltpu.InterpretParams = False
) -> tuple[jax.Array, jax.Array]:
    """Writes each row's K/V to its slot and attends over its window.

    Returns:
        outputs [S, H, Dv] in the dtype of the queries, 0 for rows of length 0; and the arena, in place.
    """
    check_decode(shape, inputs)
    num_rows = inputs.queries.shape[0]
    tile = _tile(shape, inputs)
    heads, pages = tile.heads, shape.pages
    view = as_pages(inputs.arena, pages)
    new_rows = token_planes(inputs.keys, inputs.values, pages)
    sinks = [] if inputs.sinks is None else [heads.pack_sinks(inputs.sinks)]

    def by_program(*dims: int) -> pl.BlockSpec:
        return pl.BlockSpec((tile.sequences, *dims), lambda i, *_: (i, *(0 for _ in dims)))

    whole_sinks = [pl.BlockSpec((shape.num_heads, LANES), lambda i, *_: (0, 0)) for _ in sinks]
    in_pool = pl.BlockSpec(memory_space=pl.ANY)
    places, planes = range(tile.sequences), pages.num_planes
    output_shape = jax.ShapeDtypeStruct((num_rows, *heads.output_shape), inputs.queries.dtype)
    outputs, view = pl.pallas_call(
        decode_kernel(tile, num_rows, has_sinks=bool(sinks)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_rows // tile.sequences,),
            in_specs=[by_program(*heads.query_shape), by_program(pages.num_planes, LANES), *whole_sinks, in_pool],
            out_specs=[by_program(*heads.output_shape), in_pool],
            scratch_shapes=[
                *(pltpu.VMEM((planes, tile.fetched_blocks * tile.block, LANES), view.dtype) for _ in places),
                pltpu.VMEM((tile.sequences, planes, tile.write_rows, LANES), view.dtype),
                pltpu.SemaphoreType.DMA((tile.sequences,)),
                pltpu.SemaphoreType.DMA,
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[output_shape, jax.ShapeDtypeStruct(view.shape, view.dtype)],
        input_output_aliases={6 + len(sinks): 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=100 * 2**20, disable_bounds_checks=True
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
        *sinks,
        view,
    )
    return heads.unpack_outputs(outputs), view.reshape(inputs.arena.shape)


_forced = (4, 2, 1)


def _tile(shape: AttentionShape, inputs: DecodeInputs) -> WindowTile:
    num_rows = inputs.queries.shape[0]
    want, want_heads, together = _forced
    sequences = next(n for n in range(want, 0, -1) if num_rows % n == 0)
    heads = next(n for n in range(want_heads, 0, -1) if shape.pages.num_kv_heads % n == 0)
    compute = jnp.promote_types(inputs.queries.dtype, inputs.arena.dtype)
    return WindowTile(HeadLayout(shape, heads), sequences, together, jnp.dtype(inputs.arena.dtype), jnp.dtype(compute))
