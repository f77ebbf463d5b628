"""``llama``: global attention in every layer."""

from __future__ import annotations

import dataclasses

from hkv_jax.families.decoder import Defaults, read_dimensions
from hkv_jax.families.fields import Fields
from hkv_jax.families.rope import LAYER_TYPES, RopeStyle, read_ropes
from hkv_jax.spec import LayerKind, ModelSpec

ARCHITECTURES = ("LlamaForCausalLM",)

_DEFAULTS = Defaults(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    head_dim=None,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=(2,),
)


def read(fields: Fields) -> ModelSpec:
    """The model of a ``llama`` config."""
    model = read_dimensions(fields, _DEFAULTS, "llama")
    kinds = model.kinds(fields, lambda _: False)
    if LayerKind.SLIDING in kinds:
        raise fields.error("layer_types", f"{LAYER_TYPES[LayerKind.GLOBAL]} alone; with windows it is model_type cwm")
    ropes = read_ropes(fields, kinds, RopeStyle(), model.spec.max_position)
    bias = fields.flag("attention_bias", False)
    return dataclasses.replace(
        model.spec,
        layers=model.layers(kinds, None, ropes, fields.where),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )
