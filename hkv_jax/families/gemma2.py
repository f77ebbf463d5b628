"""``gemma2``: soft caps, norms on both sides of attention and MLP, sliding and global layers in turn."""

from __future__ import annotations

import dataclasses

from hkv_jax.families.decoder import Defaults, Dimensions, read_dimensions
from hkv_jax.families.fields import Fields
from hkv_jax.families.rope import RopeStyle, read_ropes
from hkv_jax.spec import ModelSpec

ARCHITECTURES = ("Gemma2ForCausalLM",)
# Stands in configs beside hidden_activation, which counts.
IGNORED = ("hidden_act",)

_GLOBAL_EVERY = 2
_DEFAULTS = Defaults(
    vocab_size=256_000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=8192,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    tie_word_embeddings=True,
    bos_token_id=2,
    eos_token_id=(1,),
)


def read(fields: Fields) -> ModelSpec:
    """The model of a ``gemma2`` config."""
    model = read_dimensions(fields, _DEFAULTS, "gemma2")
    kinds = model.kinds(fields, lambda index: (index + 1) % _GLOBAL_EVERY != 0)
    ropes = read_ropes(fields, kinds, RopeStyle(), model.spec.max_position)
    return dataclasses.replace(
        gemma_traits(fields, model),
        layers=model.layers(kinds, fields.optional_count("sliding_window", 4096), ropes, fields.where),
        attention_soft_cap=fields.optional_number("attn_logit_softcapping", 50.0),
        final_soft_cap=fields.optional_number("final_logit_softcapping", 30.0),
    )


def gemma_traits(fields: Fields, model: Dimensions) -> ModelSpec:
    """What Gemma 2 and 3 share: scaled embeddings, norms around the branches, the scale of attention."""
    bias = fields.flag("attention_bias", False)
    return dataclasses.replace(
        model.spec,
        attention_scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        embedding_scale=model.spec.hidden_size**0.5,
        unit_offset_norm=True,
        sandwich_norm=True,
        attention_bias=bias,
        output_bias=bias,
    )
