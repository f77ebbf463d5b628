"""Attention by the Pallas kernels: what they need of a step, and the order of their calls in a layer.

Owns: the way from the engine's rows to the kernels'. On platforms other than TPU the kernels are interpreted, which is
slow and exact. Must never: know a tile or a page.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from hkv_jax.array_types import BlockTables
from hkv_jax.model.kv_arena import ArenaArray, page_geometry
from hkv_jax.model.xla_attention import AttentionInputs, AttentionSpec, StepRows
from pallas_kernels.decode_inputs import DecodeInputs
from pallas_kernels.kv_update.items import WriteItems, write_items
from pallas_kernels.kv_update.ops import update
from pallas_kernels.paged_attention.ops import decode as paged_decode
from pallas_kernels.pages import AttentionShape
from pallas_kernels.prefill_attention.ops import PrefillInputs, prefill, rows_of_step
from pallas_kernels.prefill_rows import PrefillRows, StepTokens
from pallas_kernels.rows import DecodeRows, QueryRows, global_rows, windowed_rows
from pallas_kernels.scales import NewKV
from pallas_kernels.windowed_attention.ops import decode as windowed_decode

LEAST_PREFILL_TOKENS = 16


class KernelStep(NamedTuple):
    """What the layers of a group share in a step; the last two are ``None`` in steps of decode rows alone."""

    decode: DecodeRows
    prefill: PrefillRows | None
    items: WriteItems | None


def kernel_step(
    spec: AttentionSpec,
    tables: BlockTables,
    slots: jax.Array,
    rows: StepRows,
    queries: jax.ShapeDtypeStruct,
    has_prefill: bool,
) -> KernelStep:
    """Makes the kernels' rows of one step.

    Args:
        spec: the group.
        tables: i32[Z, M].
        slots: i32[T].
        rows: the step's rows, those with one query first.
        queries: shape [T, H, D] on one chip, and dtype, of a layer's queries.
        has_prefill: whether rows may have more than one query.
    """
    shape = attention_shape(spec, queries.shape[1])
    num_tokens = queries.shape[0]
    count = min(rows.lanes.shape[0], num_tokens)
    query_rows = QueryRows(
        rows.lanes[:count],
        rows.start_positions[:count],
        rows.context_starts[:count],
        slots[:count],
        jnp.arange(count, dtype=jnp.int32) < rows.num_decode_rows,
    )
    decode = global_rows(tables, query_rows) if spec.window is None else windowed_rows(shape, tables, query_rows)
    if not has_prefill:
        return KernelStep(decode, None, None)
    tokens = StepTokens(
        rows.lanes,
        rows.start_positions,
        rows.context_starts,
        rows.query_starts,
        rows.num_decode_rows,
        rows.num_rows,
    )
    dtypes = (jnp.dtype(spec.kv_dtype), jnp.dtype(queries.dtype))
    prefilled = rows_of_step(shape, tables, tokens, _prefill_tokens(num_tokens), dtypes)
    return KernelStep(decode, prefilled, write_items(shape.pages, tokens, slots))


def attend(
    spec: AttentionSpec, inputs: AttentionInputs, new: NewKV, step: KernelStep, interpret: bool
) -> tuple[jax.Array, ArenaArray]:
    """Writes the step's keys and values, ``new`` as they are in the pool, and attends, on one chip.

    Returns:
        [T, H, D], the dtype of the queries, and the arena. Positions past the live tokens hold unspecified values.
    """
    mode: bool | pltpu.InterpretParams = pltpu.InterpretParams() if interpret else False
    shape = attention_shape(spec, inputs.queries.shape[1])
    queries, arena = inputs.queries, inputs.arena
    if step.items is not None:
        arena = update(shape.pages, new, arena, inputs.layer, step.items, mode)
    count = step.decode.kv_lens.shape[0]
    decode = paged_decode if spec.window is None else windowed_decode
    decode_inputs = DecodeInputs(
        queries[:count],
        new.keys[:count],
        new.values[:count],
        arena,
        inputs.layer,
        step.decode,
        inputs.sinks,
        None if new.words is None else new.words[:count],
    )
    outputs, arena = decode(shape, decode_inputs, mode)
    if step.prefill is None:
        return outputs, arena
    num_tokens = queries.shape[0]
    queries, outputs, new = jax.tree.map(
        lambda array: _with_tokens(array, _prefill_tokens(num_tokens)), (queries, outputs, new)
    )
    prefill_inputs = PrefillInputs(
        queries, new.keys, new.values, arena, inputs.layer, step.prefill, outputs, inputs.sinks, new.words
    )
    return prefill(shape, prefill_inputs, mode)[:num_tokens], arena


def attention_shape(spec: AttentionSpec, num_heads: int) -> AttentionShape:
    """A group's attention with that many query heads, as the kernels see it."""
    return AttentionShape(page_geometry(spec.format), num_heads, spec.window, spec.scale, spec.soft_cap)


def _prefill_tokens(num_tokens: int) -> int:
    """The power of two that many tokens are padded to."""
    return max(LEAST_PREFILL_TOKENS, 1 << (num_tokens - 1).bit_length())


def _with_tokens(array: jax.Array, num_tokens: int) -> jax.Array:
    return jnp.pad(array, ((0, num_tokens - array.shape[0]), *((0, 0) for _ in array.shape[1:])))
