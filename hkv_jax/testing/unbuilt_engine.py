"""Step programs of a model that exists only as a description: lowered and compiled for shapes, never run.

Owns: small hybrid specs, and the way from a spec to a ``ProgramFactory`` with the shapes of its arguments. Must never:
allocate what the programs would run on; the mesh may be one of devices that this machine does not have.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hkv_jax.engine.batch_format import BatchFormat, Bucket
from hkv_jax.engine.blueprint import Blueprint
from hkv_jax.engine.device_state import DeviceState
from hkv_jax.engine.programs import ProgramFactory
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.kvcache.layout import KVLayout, LayoutRequest, plan_layout
from hkv_jax.model.transformer import Decoder, ModelParameters
from hkv_jax.model.xla_attention import AttentionBackend, AttentionSpec
from hkv_jax.spec import Activation, LayerKind, LayerSpec, ModelSpec, RopeSpec


def hybrid_spec(num_layers: int = 6, period: int = 3, window: int = 16, **changes: Any) -> ModelSpec:
    """A small hybrid: the last layer of each ``period`` is global, the others slide; ``changes`` are spec fields.

    ``num_kv_heads`` and ``head_dim`` may be among the changes; they are every layer's.
    """
    heads, dim = changes.pop("num_kv_heads", 2), changes.pop("head_dim", 8)
    sliding = LayerSpec(LayerKind.SLIDING, window, heads, dim, RopeSpec(1e4))
    everywhere = LayerSpec(LayerKind.GLOBAL, None, heads, dim, RopeSpec(1e6))
    fields: dict[str, Any] = {
        "architecture": "test",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "layers": tuple(everywhere if i % period == period - 1 else sliding for i in range(num_layers)),
        "activation": Activation.SILU,
        "norm_eps": 1e-6,
        "attention_scale": dim**-0.5,
        "max_position": 4096,
        "eos_token_ids": (1,),
        "tie_embeddings": True,
    }
    return ModelSpec(**(fields | changes))


@dataclasses.dataclass(frozen=True)
class UnbuiltEngine:
    """What decides an engine's programs.

    ``budget_bytes`` is the KV cache of one device; ``scanned`` chooses the layer loop over periods, ``backend`` what
    computes attention. Blocks are small (8 tokens in sliding groups, 16 in global ones) in pages of rows, and have the
    default sizes in pages of planes.
    """

    spec: ModelSpec
    mesh: Mesh
    dtype: jnp.dtype
    budget_bytes: int
    page_layout: PageLayout = PageLayout.ROWS
    scanned: bool = False
    max_num_seqs: int = 4
    max_chunk: int = 32
    max_model_len: int = 256
    backend: AttentionBackend = AttentionBackend.XLA

    @cached_property
    def layout(self) -> KVLayout:
        """The cache's layout."""
        small = self.page_layout is PageLayout.ROWS
        return plan_layout(
            LayoutRequest(
                groups=self.spec.kv_groups(),
                budget_bytes=self.budget_bytes,
                max_model_len=self.max_model_len,
                config_max_len=self.spec.max_position,
                expected_average_seq_length=None,
                block_sizes={"sliding": 8, "global": 16} if small else {},
                partition="moving",
                page_layout=self.page_layout,
                itemsize=self.dtype.itemsize,
                tensor_parallel=self.mesh.size,
                max_chunk=self.max_chunk,
                max_num_seqs=self.max_num_seqs,
            )
        )

    @cached_property
    def blueprint(self) -> Blueprint:
        """What the programs are made from."""
        return Blueprint(
            self.spec,
            self.mesh,
            self.layout,
            self.dtype,
            self.dtype,
            self.max_num_seqs,
            scanned=self.scanned,
            backend=self.backend,
        )

    @property
    def decoder(self) -> Decoder:
        """The model on its mesh."""
        return self.blueprint.decoder

    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """Each group's attention."""
        return self.blueprint.attention

    @cached_property
    def factory(self) -> ProgramFactory:
        """Lowers the programs."""
        return self.blueprint.factory()

    @property
    def parameters(self) -> ModelParameters:
        """Shapes of the parameters."""
        return self.blueprint.parameters

    @property
    def state(self) -> DeviceState:
        """Shapes of the device state."""
        return self.blueprint.state

    def lower_step(self, bucket: Bucket) -> jax.stages.Lowered:
        """The step of a bucket."""
        return self.factory.lower_step(BatchFormat(bucket, self.layout.block_sizes), self.parameters, self.state)
