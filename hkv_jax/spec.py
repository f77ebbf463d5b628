"""What a model is, as plain data: the only description of a model the rest of the runtime reads.

Owns: the kinds of layer, the shape of each, and how layers form KV groups. Must never: import jax, read files, or know
a model family by name (``hkv_jax.families`` translates a ``config.json`` into these types).

The attention window ``W`` counts tokens including the query itself: token ``i`` sees token ``j`` when ``0 <= i - j <
W``.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence


class LayerKind(enum.StrEnum):
    """How a layer attends: to everything before it, or to the last ``window`` tokens."""

    GLOBAL = "global"
    SLIDING = "sliding"


class Activation(enum.StrEnum):
    """The gate of the gated MLP."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclasses.dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """The frequency-dependent RoPE interpolation of Llama 3.1 (section "RoPE scaling" of its model card)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of one layer.

    ``theta`` is the base; ``linear_factor`` divides positions (1.0: none); ``llama3`` rescales frequencies.
    At most one of the two scalings is set. The whole head dimension rotates, halves paired (``rotate_half``).
    """

    theta: float
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer's attention: kind, window (tokens; ``None`` for global), heads and RoPE."""

    kind: LayerKind
    window: int | None
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec

    def __post_init__(self) -> None:
        if (self.window is None) != (self.kind is LayerKind.GLOBAL):
            raise ValueError(f"a {self.kind} layer has window {self.window}")

    @property
    def kv_key(self) -> tuple[LayerKind, int, int, int]:
        """What must be equal for two layers to share a block table."""
        return (self.kind, self.window or 0, self.num_kv_heads, self.head_dim)


@dataclasses.dataclass(frozen=True, slots=True)
class KVGroupSpec:
    """Layers with equal kind, window, kv heads and head dim; they share one block table.

    ``layers`` are indices into ``ModelSpec.layers``, ascending: the l-th of them reads page ``id + l``.
    """

    name: str
    kind: LayerKind
    window: int | None
    num_kv_heads: int
    head_dim: int
    layers: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """Layers of the model that keep their K/V in this group."""
        return len(self.layers)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only language model.

    Attributes:
        architecture: the ``model_type`` it was read from, for messages only.
        num_heads: query heads of every layer.
        attention_scale: factor on q·k (``query_pre_attn_scalar ** -0.5`` or ``head_dim ** -0.5``).
        attention_soft_cap, final_soft_cap: ``cap * tanh(x / cap)`` on scores / logits, or ``None``.
        embedding_scale: factor on embedded tokens (Gemma: ``sqrt(hidden_size)``; it is rounded to the compute dtype).
        unit_offset_norm: RMSNorm multiplies by ``1 + weight`` (Gemma) instead of ``weight``.
        sandwich_norm: norms after attention and MLP too (Gemma 2, 3), beside those before.
        qk_norm: RMSNorm over the head dim of q and k, before RoPE.
        attention_bias: q, k, v projections have biases; ``output_bias``: so does o.
        mlp_bias: gate, up, down projections have biases.
        tie_embeddings: logits use the embedding matrix.
        max_position: longest sequence the config allows, in tokens.
        eos_token_ids: every id that ends a generation, in the checkpoint's order.
        dtype: the checkpoint's own compute dtype, ``float32`` or ``bfloat16``.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    layers: tuple[LayerSpec, ...]
    activation: Activation
    norm_eps: float
    attention_scale: float
    max_position: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embedding_scale: float = 1.0
    unit_offset_norm: bool = False
    sandwich_norm: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    dtype: str = "bfloat16"

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def period(self) -> int:
        """The smallest p for which layer i equals layer i + p throughout: what a layer scan repeats over."""
        n = self.num_layers
        return next(p for p in range(1, n + 1) if all(self.layers[i] == self.layers[i + p] for i in range(n - p)))

    def kv_groups(self) -> tuple[KVGroupSpec, ...]:
        """The KV groups, global ones first, each kind in order of first appearance.

        A group is called ``global`` or ``sliding``; ``_w<W>`` and then ``_k<K>d<D>`` are appended only where a model
        has several groups that would otherwise share a name.
        """
        return group_layers(self.layers)


def group_layers(layers: Sequence[LayerSpec]) -> tuple[KVGroupSpec, ...]:
    """The KV groups of ``layers``, as ``ModelSpec.kv_groups`` names and orders them."""
    by_key: dict[tuple[LayerKind, int, int, int], list[int]] = {}
    for index, layer in enumerate(layers):
        by_key.setdefault(layer.kv_key, []).append(index)
    keys = sorted(by_key, key=lambda key: (key[0] is not LayerKind.GLOBAL, by_key[key][0]))
    return tuple(
        KVGroupSpec(name, key[0], key[1] or None, key[2], key[3], tuple(by_key[key]))
        for key, name in zip(keys, _group_names(keys), strict=True)
    )


def _group_names(keys: Sequence[tuple[LayerKind, int, int, int]]) -> list[str]:
    names = []
    for kind, window, heads, dim in keys:
        name = str(kind)
        same_kind = [key for key in keys if key[0] is kind]
        if len({key[1] for key in same_kind}) > 1:
            name += f"_w{window}"
        if sum(key[1] == window for key in same_kind) > 1:
            name += f"_k{heads}d{dim}"
        names.append(name)
    return names
