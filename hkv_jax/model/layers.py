"""The modules of a decoder as flax nnx modules: which parameters they have, their shapes, and what they compute.

Modules give structure only. They are never filled: at load ``parameters`` asks for their abstract state, and inside a
step ``bind`` lays the layer's arrays over it for the time of a trace. Attribute names are the parameter names of
``hkv_jax.families.tensor_names``. Must never: touch the KV arena (a layer is handed a function that attends).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from hkv_jax.array_types import Hidden, Logits
from hkv_jax.model.matmul import project, project_to_vocabulary
from hkv_jax.model.rope import apply_rope
from hkv_jax.spec import Activation, LayerSpec, ModelSpec

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q [T, H, D], k [T, K, D], v [T, K, D]) → [T, H, D]."""

Angles = tuple[jax.Array, jax.Array]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)


def rms_norm(x: jax.Array, weight: jax.Array, spec: ModelSpec) -> jax.Array:
    """RMSNorm over the last axis, computed in float32 (Zhang & Sennrich, arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + spec.norm_eps)
    if spec.unit_offset_norm:
        return (normed * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * weight


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """``cap * tanh(x / cap)``, or x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class DecoderLayer(nnx.Module):
    """Attention and gated MLP with their norms, one body for every family.

    ``num_kv_heads`` is the count after replication for tensor parallelism, at least the layer's own; ``platform`` is
    where it will run.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, num_kv_heads: int, platform: str) -> None:
        hidden, dim, width = spec.hidden_size, layer.head_dim, spec.intermediate_size
        query_size, kv_size = spec.num_heads * dim, num_kv_heads * dim
        self.spec, self.head_dim, self.platform = spec, dim, platform
        self.attention_norm = _param(hidden)
        self.q, self.k, self.v = _param(query_size, hidden), _param(kv_size, hidden), _param(kv_size, hidden)
        self.o = _param(hidden, query_size)
        self.mlp_norm = _param(hidden)
        self.gate, self.up, self.down = _param(width, hidden), _param(width, hidden), _param(hidden, width)
        if spec.attention_bias:
            self.q_bias, self.k_bias, self.v_bias = _param(query_size), _param(kv_size), _param(kv_size)
        if spec.output_bias:
            self.o_bias = _param(hidden)
        if spec.qk_norm:
            self.q_norm, self.k_norm = _param(dim), _param(dim)
        if spec.sandwich_norm:
            self.post_attention_norm, self.post_mlp_norm = _param(hidden), _param(hidden)
        if spec.mlp_bias:
            self.gate_bias, self.up_bias, self.down_bias = _param(width), _param(width), _param(hidden)

    def __call__(self, x: Hidden, angles: Angles, attend: Attend) -> Hidden:
        """x [T, E] → [T, E]; ``angles`` are this layer's RoPE cosine and sine, f32[T, D/2]."""
        normed = rms_norm(x, self.attention_norm[...], self.spec)
        queries, keys, values = (self._heads(name, normed) for name in ("q", "k", "v"))
        if self.spec.qk_norm:
            queries = rms_norm(queries, self.q_norm[...], self.spec)
            keys = rms_norm(keys, self.k_norm[...], self.spec)
        attended = attend(apply_rope(queries, angles), apply_rope(keys, angles), values)
        branch = self._linear("o", attended.reshape(x.shape[0], -1))
        x = x + self._after(branch, "post_attention_norm")
        normed = rms_norm(x, self.mlp_norm[...], self.spec)
        gate = _activate(self.spec.activation, self._linear("gate", normed))
        branch = self._linear("down", gate * self._linear("up", normed))
        return x + self._after(branch, "post_mlp_norm")

    def _linear(self, name: str, x: jax.Array) -> jax.Array:
        product = project(x, getattr(self, name)[...], self.platform)
        bias = getattr(self, f"{name}_bias", None)
        return (product if bias is None else product + bias[...].astype(jnp.float32)).astype(x.dtype)

    def _heads(self, name: str, x: jax.Array) -> jax.Array:
        return self._linear(name, x).reshape(x.shape[0], -1, self.head_dim)

    def _after(self, branch: jax.Array, norm: str) -> jax.Array:
        return rms_norm(branch, getattr(self, norm)[...], self.spec) if self.spec.sandwich_norm else branch


class Embedder(nnx.Module):
    """Token embedding, final norm and the projection to logits."""

    def __init__(self, spec: ModelSpec, platform: str) -> None:
        self.spec, self.platform = spec, platform
        self.embedding = _param(spec.vocab_size, spec.hidden_size)
        self.final_norm = _param(spec.hidden_size)
        if not spec.tie_embeddings:
            self.lm_head = _param(spec.vocab_size, spec.hidden_size)

    def embed(self, tokens: jax.Array) -> Hidden:
        """i32[T] → [T, E] in the compute dtype. Ids out of range are clipped (padding only)."""
        table = self.embedding[...]
        taken = table.at[tokens].get(mode="clip")
        # The scale is rounded to the compute dtype first, as the models were trained.
        return (
            taken if self.spec.embedding_scale == 1.0 else taken * jnp.asarray(self.spec.embedding_scale, table.dtype)
        )

    def logits(self, x: Hidden) -> Logits:
        """[S, E] → f32[S, V], final norm and soft cap applied."""
        head = self.embedding if self.spec.tie_embeddings else self.lm_head
        normed = rms_norm(x, self.final_norm[...], self.spec)
        return soft_cap(project_to_vocabulary(normed, head[...], self.platform), self.spec.final_soft_cap)


def abstract_parameters(module: Callable[[], nnx.Module]) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of a module, without allocating it."""
    state = nnx.state(nnx.eval_shape(module))
    return {str(path[0]): tuple(leaf.shape) for path, leaf in nnx.to_flat_state(state)}


def bind(module: Callable[[], ModuleT], arrays: Mapping[str, jax.Array]) -> ModuleT:
    """The module with ``arrays`` for parameters, by name; for use inside a trace."""
    graph, state = nnx.split(nnx.eval_shape(module))
    nnx.replace_by_pure_dict(state, dict(arrays))
    return nnx.merge(graph, state)


def _param(*shape: int) -> nnx.Param[jax.Array]:
    return nnx.Param(jnp.zeros(shape))


def _activate(activation: Activation, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    gated = jax.nn.silu(wide) if activation is Activation.SILU else jax.nn.gelu(wide, approximate=True)
    return gated.astype(x.dtype)
