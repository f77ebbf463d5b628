"""``cwm``: a Llama whose layers are global or sliding, every fourth global from the first on unless told otherwise."""

from __future__ import annotations

import dataclasses

from hkv_jax.families.decoder import Defaults, read_dimensions
from hkv_jax.families.fields import Fields
from hkv_jax.families.rope import RopeStyle, read_ropes
from hkv_jax.spec import ModelSpec

ARCHITECTURES = ("CwmForCausalLM",)

_GLOBAL_EVERY = 4
_DEFAULTS = Defaults(
    vocab_size=128_256,
    hidden_size=6144,
    intermediate_size=21_504,
    num_hidden_layers=64,
    num_attention_heads=48,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    bos_token_id=128_000,
    eos_token_id=(128_001, 128_008, 128_009),
)
_ROPE = RopeStyle(
    theta=1_000_000.0,
    absent={
        "rope_type": "llama3",
        "rope_theta": 1_000_000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)


def read(fields: Fields) -> ModelSpec:
    """The model of a ``cwm`` config."""
    model = read_dimensions(fields, _DEFAULTS, "cwm")
    kinds = model.kinds(fields, lambda index: index % _GLOBAL_EVERY != 0)
    window = None if fields.raw("sliding_window") == 0 else fields.optional_count("sliding_window", 8192)
    ropes = read_ropes(fields, kinds, _ROPE, model.spec.max_position)
    return dataclasses.replace(
        model.spec,
        layers=model.layers(kinds, window, ropes, fields.where),
        # The class sets these where the config has none; elsewhere null means that nothing ends a generation.
        eos_token_ids=model.spec.eos_token_ids or _DEFAULTS.eos_token_id,
        mlp_bias=fields.flag("mlp_bias", False),
    )
