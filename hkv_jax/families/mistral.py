"""``mistral``: sliding attention in every layer, or global in every layer where ``sliding_window`` is null."""

from __future__ import annotations

import dataclasses

from hkv_jax.families.decoder import Defaults, read_dimensions
from hkv_jax.families.fields import Fields
from hkv_jax.families.rope import LAYER_TYPES, RopeStyle, read_ropes
from hkv_jax.spec import LayerKind, ModelSpec

ARCHITECTURES = ("MistralForCausalLM",)

_DEFAULTS = Defaults(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=None,
    max_position_embeddings=131_072,
    bos_token_id=1,
    eos_token_id=(2,),
)


def read(fields: Fields) -> ModelSpec:
    """The model of a ``mistral`` config."""
    model = read_dimensions(fields, _DEFAULTS, "mistral")
    window = fields.optional_count("sliding_window", 4096)
    kind = LayerKind.GLOBAL if window is None else LayerKind.SLIDING
    kinds = model.kinds(fields, lambda _: window is not None)
    if set(kinds) != {kind}:
        accepted = f"{LAYER_TYPES[kind]} in every layer, since sliding_window is {window}; mistral does not mix kinds"
        raise fields.error("layer_types", accepted)
    ropes = read_ropes(fields, kinds, RopeStyle(), model.spec.max_position)
    return dataclasses.replace(model.spec, layers=model.layers(kinds, window, ropes, fields.where))
