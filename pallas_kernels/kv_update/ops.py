"""Writes of a step's keys and values into the pool: validation, the call.

A kernel of its own for rows of more than one token, not fused into their attention: a global layer reads from the pool
what the step adds, so the writes come first anyway; and a window's writes are those of its newest blocks only, whole
blocks nearly all, which go from the activations to the pool without passing the core (docs/benchmarks.md).

Owns: the public function. Must never: write a block that no item names.

Axis letters: T tokens, K kv heads, D head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_update.items import WriteItems
from pallas_kernels.kv_update.kernel import UpdatePlan, update_kernel
from pallas_kernels.pages import LANES, PageGeometry, as_pages, own_rows


def update(
    pages: PageGeometry,
    keys_values: tuple[jax.Array, jax.Array],
    arena: jax.Array,
    layer: jax.Array,
    items: WriteItems,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Writes the tokens of ``items``.

    Args:
        pages: where K/V lie.
        keys_values: [T, K, Dk] and [T, K, Dv], the dtype of the pool.
        arena: [1, rows, 128] of this chip.
        layer: i32[], index in the group.
        items: what is written where.
        interpret: run on a CPU.

    Returns:
        The arena, in place.
    """
    keys, values = keys_values
    if keys.dtype != arena.dtype or values.dtype != arena.dtype:
        raise ValueError(f"keys are {keys.dtype}, values {values.dtype}; round them to the pool's {arena.dtype}")
    arrays, planes = own_rows(keys, values, pages)
    plan = UpdatePlan(pages, 0, jnp.dtype(arena.dtype), planes)
    missing = max(plan.window_rows - keys.shape[0], 0)
    arrays = [jnp.pad(array, ((0, missing), (0, 0))) for array in arrays]
    plan = UpdatePlan(pages, arrays[0].shape[0], plan.dtype, planes)
    view = as_pages(arena, pages)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    written = pl.pallas_call(
        update_kernel(plan, len(arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1,),
            in_specs=[*(anywhere for _ in arrays), anywhere],
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((2, pages.num_planes, plan.window_rows, LANES), view.dtype),
                pltpu.VMEM((2, pages.num_planes, pages.block_size, LANES), view.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(view.shape, view.dtype),
        input_output_aliases={3 + len(arrays): 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        interpret=interpret,
        name="kv_update",
    )(items.items, items.num_items, layer.reshape(1), *arrays, view)
    return written.reshape(arena.shape)
