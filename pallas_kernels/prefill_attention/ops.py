"""Attention of rows with more than one query: validation, choice of tiles, the call.

Owns: the public functions. Must never: write the pool; what a step adds to it is written before (``kv_update``).

Axis letters: T tokens, S rows, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pages import LANES, AttentionShape, by_token, own_rows
from pallas_kernels.prefill_attention.kernel import prefill_kernel
from pallas_kernels.prefill_attention.stretch_scales import ScalePlan
from pallas_kernels.prefill_attention.tile import PrefillTile, choose_tile
from pallas_kernels.prefill_rows import PrefillRows, StepTokens, prefill_rows
from pallas_kernels.scales import Arena, check_dtype, pool_views

VMEM_LIMIT_BYTES = 60 << 20
"""What a call may take of VMEM; the smallest memory of a supported chip is 64 MiB a core."""


class PrefillInputs(NamedTuple):
    """Arrays of one layer.

    Attributes:
        queries: [T, H, Dk].
        keys: [T, K, Dk] of the step's tokens, KV dtype; windowed layers alone look at them.
        values: [T, K, Dv].
        arena: [1, rows, 128] of this chip, with the step's K/V written.
        layer: i32[], index in the group.
        rows: visits and tables, made for the query tile of ``query_tile``.
        outputs: [T, H, Dv], dtype of the queries: what tokens that no row of ``rows`` has keep.
        sinks: f32[H], a learned score of each head that takes probability and gives nothing; or None.
        words: i32[T, C], scales of the step's keys and values where they are int8, as ``scales.quantise`` gives them.
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    arena: Arena
    layer: jax.Array
    rows: PrefillRows
    outputs: jax.Array
    sinks: jax.Array | None = None
    words: jax.Array | None = None


def rows_of_step(
    shape: AttentionShape, tables: jax.Array, tokens: StepTokens, num_tokens: int, dtypes: tuple[jnp.dtype, jnp.dtype]
) -> PrefillRows:
    """Rows as ``prefill`` wants them for these shapes; ``dtypes`` are those of K/V and of queries."""
    return prefill_rows(shape, tables, tokens, num_tokens, choose_tile(shape, num_tokens, *dtypes).queries)


def prefill(shape: AttentionShape, inputs: PrefillInputs, interpret: bool | pltpu.InterpretParams = False) -> jax.Array:
    """Attends for every query of the rows.

    Returns:
        outputs [T, H, Dv] in the dtype of the queries, in place of ``inputs.outputs``.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(shape, inputs)
    tile = choose_tile(shape, inputs.queries.shape[0], inputs.keys.dtype, inputs.queries.dtype)
    return run(tile, inputs, interpret)


def run(tile: PrefillTile, inputs: PrefillInputs, interpret: bool | pltpu.InterpretParams = False) -> jax.Array:
    """``prefill`` with tiles chosen elsewhere."""
    shape, pages = tile.shape, tile.shape.pages
    own = own_rows(inputs.keys, inputs.values, pages)[0] if tile.reads_own else []
    queries = by_token(inputs.queries, tile.query_lanes)
    first_lane = 0 if tile.packed else pages.value_lane
    outputs = by_token(inputs.outputs, tile.output_lanes, first_lane)
    tables = [] if tile.reads_own else [inputs.rows.tables]
    sinks = [] if inputs.sinks is None else [inputs.sinks.astype(jnp.float32)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    in_smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    if not interpret:
        # In VMEM, where XLA may have put them, copies from them would be loops of loads and stores.
        queries, outputs, *own = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (queries, outputs, *own))
    num_own = len(own)
    if tile.reads_own and inputs.words is not None:
        own.append(ScalePlan(tile).own_by_group(inputs.words))
    arrays = [queries, *own, *pool_views(inputs.arena, pages), *tables]
    result = pl.pallas_call(
        prefill_kernel(tile, (num_own, len(sinks)), table_width=inputs.rows.tables.shape[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[*(anywhere for _ in arrays), *(in_smem for _ in sinks), anywhere],
            out_specs=anywhere,
            scratch_shapes=[*_scratch(tile, inputs), *(ScalePlan(tile).scratch() if tile.scaled else [])],
        ),
        out_shape=jax.ShapeDtypeStruct(outputs.shape, outputs.dtype),
        input_output_aliases={4 + len(arrays) + len(sinks): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT_BYTES, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="windowed_prefill" if tile.reads_own else "paged_prefill",
    )(
        inputs.rows.visits,
        inputs.rows.num_visits,
        inputs.layer.reshape(1),
        inputs.rows.tables.reshape(-1) if tile.reads_own else jnp.zeros((1,), jnp.int32),
        *arrays,
        *sinks,
        outputs,
    )
    by_head = result.reshape(tile.num_tokens, shape.num_heads, tile.output_lanes)
    return by_head[..., first_lane : first_lane + pages.value_dim]


def _scratch(tile: PrefillTile, inputs: PrefillInputs) -> list[Any]:
    """In the order of ``kernel.Scratch``."""
    pages, heads, rows = tile.shape.pages, tile.heads, tile.rows
    table_rows = 1 if tile.reads_own else inputs.rows.tables.shape[1]
    lanes_in, lanes_out = heads * tile.group * tile.query_lanes, heads * tile.group * tile.output_lanes
    of_rows = pltpu.VMEM((heads, rows, LANES), jnp.float32)
    return [
        pltpu.VMEM((2, tile.queries, lanes_in), inputs.queries.dtype),
        pltpu.VMEM((2, tile.planes, tile.held_keys, LANES), tile.kv_dtype),
        pltpu.VMEM((2, tile.queries, lanes_out), inputs.outputs.dtype),
        pltpu.VMEM((heads, rows, pages.key_planes * LANES), tile.compute_dtype),
        pltpu.VMEM((heads, tile.held_keys // LANES, rows, LANES), jnp.float32),
        of_rows,
        of_rows,
        of_rows,
        pltpu.VMEM((heads, rows, pages.value_planes * LANES), jnp.float32),
        pltpu.VMEM((tile.queries, tile.keys), jnp.float32),
        pltpu.SMEM((2, table_rows, LANES), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def _check(shape: AttentionShape, inputs: PrefillInputs) -> None:
    pages, num_tokens = shape.pages, inputs.queries.shape[0]
    expected = {
        "queries": (inputs.queries, (num_tokens, shape.num_heads, pages.key_dim)),
        "keys": (inputs.keys, (num_tokens, pages.num_kv_heads, pages.key_dim)),
        "values": (inputs.values, (num_tokens, pages.num_kv_heads, pages.value_dim)),
        "outputs": (inputs.outputs, (num_tokens, shape.num_heads, pages.value_dim)),
    }
    for name, (array, wanted) in expected.items():
        if array.shape != wanted:
            raise ValueError(f"{name} has shape {array.shape}; {wanted} is needed")
    if num_tokens < 16 or num_tokens & (num_tokens - 1):
        raise ValueError(f"{num_tokens} tokens; a power of two of at least 16 is needed")
    for name, array in (("keys", inputs.keys), ("values", inputs.values)):
        check_dtype(name, array, inputs.arena, inputs.words)
