"""What the families have in common: sizes, layer kinds, the ids that end a generation, the data type.

Owns: turning these fields into a ``ModelSpec`` without layers, and kinds, windows and RoPE into layers. Must never:
know one family's habits (a family's own file hands in its defaults).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from hkv_jax.errors import ConfigError
from hkv_jax.families.fields import MAX_COUNT, Fields
from hkv_jax.families.rope import LAYER_TYPES
from hkv_jax.spec import Activation, LayerKind, LayerSpec, ModelSpec, RopeSpec

logger = logging.getLogger("hkv_jax.families")

MAX_LAYERS = 4096
_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}
_KINDS = {
    "full_attention": LayerKind.GLOBAL,
    "attention": LayerKind.GLOBAL,
    "sliding_attention": LayerKind.SLIDING,
}
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What absent fields are in a family: the defaults of its config class in transformers 5.

    ``num_key_value_heads`` of ``None``: as many as query heads. ``head_dim`` of ``None``: ``hidden_size`` divided by
    the query heads. ``activation`` is the name of the field and its value.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    head_dim: int | None
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    activation: tuple[str, str] = ("hidden_act", "silu")
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Dimensions:
    """The part of a model that every family spells alike; ``spec`` has no layers yet."""

    spec: ModelSpec
    num_layers: int
    num_kv_heads: int
    head_dim: int

    def kinds(self, fields: Fields, is_sliding: Callable[[int], bool]) -> tuple[LayerKind, ...]:
        """The kind of each layer: ``layer_types`` where it is given, else ``is_sliding`` of the layer's index.

        Raises:
            ConfigError: a kind of layer that is not supported, or not one for each layer.
        """
        given = fields.raw("layer_types")
        if given is None:
            return tuple(LayerKind.SLIDING if is_sliding(i) else LayerKind.GLOBAL for i in range(self.num_layers))
        if not isinstance(given, list) or any(not isinstance(one, str) or one not in _KINDS for one in given):
            raise fields.error("layer_types", f"a list of {' and '.join(LAYER_TYPES.values())}")
        if len(given) != self.num_layers:
            raise ConfigError(
                f"{fields.where}: layer_types has {len(given)} entries, but num_hidden_layers is {self.num_layers}"
            )
        return tuple(_KINDS[one] for one in given)

    def layers(
        self, kinds: Sequence[LayerKind], window: int | None, ropes: dict[LayerKind, RopeSpec], where: str
    ) -> tuple[LayerSpec, ...]:
        """One ``LayerSpec`` for each of ``kinds``; ``window`` is that of all sliding layers.

        Raises:
            ConfigError: there are sliding layers but no window.
        """
        if window is None and LayerKind.SLIDING in kinds:
            raise ConfigError(f"{where}: sliding_window is null, but the model has sliding_attention layers")
        by_kind = {
            kind: LayerSpec(
                kind, window if kind is LayerKind.SLIDING else None, self.num_kv_heads, self.head_dim, ropes[kind]
            )
            for kind in set(kinds)
        }
        return tuple(by_kind[kind] for kind in kinds)


def read_dimensions(fields: Fields, defaults: Defaults, architecture: str) -> Dimensions:
    """The sizes of a model.

    Raises:
        ConfigError: a size is missing, out of range, or does not divide another.
    """
    num_heads = fields.count("num_attention_heads", defaults.num_attention_heads)
    hidden_size = fields.count("hidden_size", defaults.hidden_size)
    num_kv_heads = _read_num_kv_heads(fields, defaults, num_heads)
    head_dim = _read_head_dim(fields, defaults, hidden_size, num_heads)
    vocab_size = fields.count("vocab_size", defaults.vocab_size)
    activation_field, activation = defaults.activation
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size", defaults.intermediate_size),
        num_heads=num_heads,
        layers=(),
        activation=_ACTIVATIONS[fields.choice(activation_field, activation, _ACTIVATIONS)],
        norm_eps=fields.number("rms_norm_eps", defaults.rms_norm_eps),
        attention_scale=head_dim**-0.5,
        max_position=fields.count("max_position_embeddings", defaults.max_position_embeddings),
        eos_token_ids=fields.token_ids("eos_token_id", defaults.eos_token_id),
        bos_token_id=_read_bos(fields, defaults),
        tie_embeddings=fields.flag("tie_word_embeddings", defaults.tie_word_embeddings),
        dtype=read_dtype(fields) or "float32",
    )
    num_layers = fields.count("num_hidden_layers", defaults.num_hidden_layers, high=MAX_LAYERS)
    return Dimensions(spec, num_layers, num_kv_heads, head_dim)


def read_dtype(fields: Fields) -> str | None:
    """The checkpoint's compute dtype, ``float32`` or ``bfloat16``; ``None`` when the config does not say.

    Raises:
        ConfigError: a type that is not supported.
    """
    new, old = fields.raw("dtype"), fields.raw("torch_dtype")
    name = "dtype" if new is not None or old is None else "torch_dtype"
    if fields.raw(name) is None:
        return None
    return computable_dtype(fields.choice(name, "", _DTYPES))


def computable_dtype(name: str) -> str:
    """``name`` itself, but bfloat16 for float16, in which no device here computes."""
    if name != "float16":
        return name
    logger.warning("a float16 model computes in bfloat16, with fewer bits; dtype float32 keeps them all")
    return "bfloat16"


def check_eos(spec: ModelSpec) -> ModelSpec:
    """``spec`` without EOS ids that no token of the vocabulary has; they cannot be drawn."""
    kept = tuple(one for one in spec.eos_token_ids if 0 <= one < spec.vocab_size)
    if len(kept) < len(spec.eos_token_ids):
        outside = [one for one in spec.eos_token_ids if one not in kept]
        logger.warning("eos_token_id %s is outside the vocabulary of %d and never drawn", outside, spec.vocab_size)
    return dataclasses.replace(spec, eos_token_ids=kept)


def _read_num_kv_heads(fields: Fields, defaults: Defaults, num_heads: int) -> int:
    num_kv_heads = fields.optional_count("num_key_value_heads", defaults.num_key_value_heads) or num_heads
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads, which is {num_heads}")
    return num_kv_heads


def _read_head_dim(fields: Fields, defaults: Defaults, hidden_size: int, num_heads: int) -> int:
    head_dim = fields.optional_count("head_dim", defaults.head_dim)
    if head_dim is None:
        head_dim, rest = divmod(hidden_size, num_heads)
        if rest:
            raise ConfigError(
                f"{fields.where}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}, "
                "and head_dim is not given"
            )
    if head_dim % 2:
        raise ConfigError(f"{fields.where}: head_dim is {head_dim}; RoPE needs an even number")
    return head_dim


def _read_bos(fields: Fields, defaults: Defaults) -> int | None:
    value = fields.raw("bos_token_id", defaults.bos_token_id)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT):
        raise fields.error("bos_token_id", "a token id or null")
    return value
