"""One attention layer over the arena: write the new K/V and attend, each chip on its own heads (``shard_map``).

Owns: the partition of the arguments over chips, and which backend computes. Must never: know a model family, or look
inside a page.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh, PartitionSpec

from hkv_jax.array_types import BlockTables, Queries
from hkv_jax.model.kv_arena import ArenaArray, as_read, rounded, write_kv
from hkv_jax.model.pallas_attention import KernelStep, attend, kernel_step
from hkv_jax.model.xla_attention import (
    AttentionBackend,
    AttentionInputs,
    AttentionSpec,
    StepRows,
    paged_attention,
)
from hkv_jax.sharding import MODEL_AXIS, OVER_CHIPS, OVER_HEADS, REPLICATED


@dataclasses.dataclass(frozen=True)
class GroupStep:
    """What every layer of a group shares in one step: static spec, tables i32[Z, M], slots i32[T], rows.

    ``kernels`` is what the Pallas backend made of these, ``None`` for others.
    """

    spec: AttentionSpec
    tables: BlockTables
    slots: jax.Array
    rows: StepRows
    kernels: KernelStep | None = None

    def prepared(self, mesh: Mesh, queries: jax.ShapeDtypeStruct, has_prefill: bool) -> GroupStep:
        """With what the backend makes once a step; ``queries`` [T, H, D] are those of a layer, on all chips."""
        if self.spec.backend is not AttentionBackend.PALLAS:
            return self
        tokens, heads, dim = queries.shape
        on_a_chip = jax.ShapeDtypeStruct((tokens, heads // mesh.shape[MODEL_AXIS], dim), queries.dtype)
        made = kernel_step(self.spec, self.tables, self.slots, self.rows, on_a_chip, has_prefill)
        return dataclasses.replace(self, kernels=made)


@dataclasses.dataclass(frozen=True)
class LayerArrays:
    """One layer's own: its index in the group, q [T, H, D], k and v [T, K, D], sinks f32[H] or None."""

    layer: jax.Array | int
    queries: Queries
    keys: jax.Array
    values: jax.Array
    sinks: jax.Array | None = None


def write_and_attend(
    mesh: Mesh, step: GroupStep, layer: LayerArrays, arena: ArenaArray, has_prefill: bool
) -> tuple[Queries, ArenaArray]:
    """Writes the layer's new keys and values to their slots and attends.

    New K/V is rounded to the KV dtype before either use, so that where a key comes from changes nothing.

    Returns:
        outputs [T, H, D] in the dtype of the queries, and the arena.
    """
    spec = step.spec
    index = jax.numpy.asarray(layer.layer, jax.numpy.int32)
    sink_partition = None if layer.sinks is None else PartitionSpec(MODEL_AXIS)

    def local(inputs: AttentionInputs, slots: jax.Array, kernels: KernelStep | None) -> tuple[jax.Array, ArenaArray]:
        new = rounded(spec.format, spec.kv_dtype, inputs.keys, inputs.values)
        if kernels is not None:
            return attend(spec, inputs, new, kernels, interpret=mesh.devices.flat[0].platform != "tpu")
        # Written first, so that reading depends on the write: the other order makes XLA copy the arena.
        arena = write_kv(inputs.arena, spec.format, inputs.layer, slots, new)
        keys, values = as_read(spec.format, new)
        return paged_attention(spec, inputs._replace(arena=arena, keys=keys, values=values), has_prefill), arena

    rows = StepRows(*(REPLICATED for _ in StepRows._fields))
    partitions = AttentionInputs(
        OVER_HEADS, OVER_HEADS, OVER_HEADS, OVER_CHIPS, REPLICATED, REPLICATED, rows, sink_partition
    )
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(partitions, REPLICATED, jax.tree.map(lambda _: REPLICATED, step.kernels)),
        out_specs=(OVER_HEADS, OVER_CHIPS),
        check_vma=False,
    )
    inputs = AttentionInputs(layer.queries, layer.keys, layer.values, arena, index, step.tables, step.rows, layer.sinks)
    return mapped(inputs, step.slots, step.kernels)
