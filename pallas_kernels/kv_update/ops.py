"""Writes of a step's keys and values into the pool: validation, the call.

A kernel of its own for rows of more than one token, not fused into their attention: a global layer reads from the pool
what the step adds, so the writes come first anyway; and a window's writes are those of its newest blocks only, whole
blocks nearly all, which go from the activations to the pool without passing the core (docs/benchmarks.md).

Owns: the public function. Must never: write a block that no item names.

Axis letters: T tokens, K kv heads, D head dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import vector_memory
from pallas_kernels.kv_update.items import WriteItems
from pallas_kernels.kv_update.kernel import UpdatePlan, update_kernel
from pallas_kernels.pages import LANES, PageGeometry, own_rows
from pallas_kernels.scales import Arena, NewKV, arena_of, check_dtype, pool_views
from pallas_kernels.vector_memory import VectorBuffer


def update(
    pages: PageGeometry,
    new: NewKV,
    arena: Arena,
    layer: jax.Array,
    items: WriteItems,
    interpret: bool | pltpu.InterpretParams = False,
) -> Arena:
    """Writes the tokens of ``items``.

    Args:
        pages: where K/V lie.
        new: keys and values of the step's tokens.
        arena: [1, rows, 128] of this chip.
        layer: i32[], index in the group.
        items: what is written where.
        interpret: run on a CPU.

    Returns:
        The arena, in place.

    Raises:
        ValueError: keys or values are not of the pool's dtype.
    """
    for name, array in (("keys", new.keys), ("values", new.values)):
        check_dtype(name, array, arena, new.words)
    arrays, planes = own_rows(new.keys, new.values, pages)
    view, *words = pool_views(arena, pages)
    plan = UpdatePlan(pages, 0, jnp.dtype(view.dtype), planes)
    written = [_call(plan, arrays, view, (layer, items, interpret))]
    for word_view in words:
        assert new.words is not None
        word_plan = UpdatePlan(pages, 0, jnp.dtype(word_view.dtype), (), of_words=True)
        written.append(_call(word_plan, [new.words.T], word_view, (layer, items, interpret)))
    return arena_of(written, arena)


def _call(
    plan: UpdatePlan, arrays: list[jax.Array], view: jax.Array, call: tuple[jax.Array, WriteItems, Any]
) -> jax.Array:
    """Writes what lies in ``arrays``, tokens by row (words: by lane), to the pages of ``view``."""
    layer, items, interpret = call
    axis = 1 if plan.of_words else 0
    num_tokens = max(-(-arrays[0].shape[axis] // plan.row_tile) * plan.row_tile, plan.window_rows)
    missing = num_tokens - arrays[0].shape[axis]
    plan = dataclasses.replace(plan, num_tokens=num_tokens)
    padding = ((0, 0), (0, missing)) if plan.of_words else ((0, missing), (0, 0))
    arrays = [jnp.pad(array, padding) for array in arrays]
    planes, window = plan.pages.num_planes, plan.window_rows
    window_shape = (planes, window) if plan.of_words else (planes, window, LANES)
    buffers = [VectorBuffer((2, *shape), view.dtype) for shape in (window_shape, view.shape[1:])]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        update_kernel(plan, len(arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(1,),
            in_specs=[*(anywhere for _ in arrays), anywhere],
            out_specs=anywhere,
            scratch_shapes=[
                *vector_memory.allocations(buffers),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(view.shape, view.dtype),
        input_output_aliases={3 + len(arrays): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vector_memory.limit(buffers),
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="scale_update" if plan.of_words else "kv_update",
    )(items.items, items.num_items, layer.reshape(1), *arrays, view)
