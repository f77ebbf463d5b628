"""From a model, its mesh and the layout of its cache to what the programs are made from, without a choice left.

Owns: kv heads after replication, the storage dtype of the arenas, the precision of products, each group's attention.
Must never: choose what it is made of (``engine.factory`` does, and tests do), or allocate anything: the mesh may be
one of devices that this machine does not have.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import jax.numpy as jnp
from jax.sharding import Mesh

from hkv_jax.engine.device_state import DeviceState, state_shapes
from hkv_jax.engine.programs import ProgramFactory
from hkv_jax.kvcache.layout import KVLayout
from hkv_jax.model.kv_arena import storage_dtype
from hkv_jax.model.parameters import parameter_shapes
from hkv_jax.model.transformer import Decoder, ModelParameters
from hkv_jax.model.xla_attention import AttentionBackend, AttentionSpec
from hkv_jax.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What decides an engine's programs, but for the buckets.

    ``dtype`` is that of weights and computation, ``kv_dtype`` that of cached keys and values; ``num_lanes`` are
    sequences running at once; ``scanned`` chooses the layer loop over periods, ``backend`` what computes attention.
    """

    spec: ModelSpec
    mesh: Mesh
    layout: KVLayout
    dtype: jnp.dtype
    kv_dtype: jnp.dtype
    num_lanes: int
    scanned: bool
    backend: AttentionBackend = AttentionBackend.XLA

    @cached_property
    def decoder(self) -> Decoder:
        """The model on its mesh; where there are fewer kv heads than chips, each chip has one of its own."""
        heads = tuple(max(layer.num_kv_heads, self.mesh.size) for layer in self.spec.layers)
        arenas = tuple(group.arena for group in self.layout.groups)
        periods = self.spec.num_layers // self.spec.period if self.scanned else 0
        return Decoder(self.spec, self.mesh, heads, arenas, periods)

    @cached_property
    def parameters(self) -> ModelParameters:
        """Shape, dtype and sharding of every parameter."""
        return parameter_shapes(self.decoder, self.dtype)

    @cached_property
    def state(self) -> DeviceState:
        """Shape, dtype and sharding of everything the device keeps from step to step."""
        stored = storage_dtype(self.kv_dtype, self.decoder.platform)
        if self.backend is AttentionBackend.PALLAS:
            # The kernels read values, not bits.
            stored = self.kv_dtype
        return state_shapes(self.layout, self.mesh, self.num_lanes, self.spec.vocab_size, stored)

    @cached_property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """Each group's attention, in the order of the layout."""
        scale, cap = self.spec.attention_scale, self.spec.attention_soft_cap
        return tuple(
            AttentionSpec(group.format, group.spec.window, group.table_width, scale, cap, self.kv_dtype, self.backend)
            for group in self.layout.groups
        )

    def factory(self, kind: type[ProgramFactory] = ProgramFactory) -> ProgramFactory:
        """What lowers the programs; ``kind`` may be one that adds outputs to the step."""
        # No platform may round the products of a float32 model silently.
        precision = "highest" if self.dtype == jnp.float32 else None
        return kind(self.decoder, self.attention, self.layout, precision)
