"""``qwen3``: QK norm; windows only where ``use_sliding_window`` says so, from layer ``max_window_layers`` on."""

from __future__ import annotations

import dataclasses

from hkv_jax.errors import ConfigError
from hkv_jax.families.decoder import MAX_LAYERS, Defaults, read_dimensions
from hkv_jax.families.fields import Fields
from hkv_jax.families.rope import RopeStyle, read_ropes
from hkv_jax.spec import LayerKind, ModelSpec

ARCHITECTURES = ("Qwen3ForCausalLM",)

_DEFAULTS = Defaults(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=22_016,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=32_768,
)


def read(fields: Fields) -> ModelSpec:
    """The model of a ``qwen3`` config."""
    model = read_dimensions(fields, _DEFAULTS, "qwen3")
    used = fields.flag("use_sliding_window", False)
    window = fields.optional_count("sliding_window", 4096)
    first = 0 if fields.raw("max_window_layers") == 0 else fields.count("max_window_layers", 28, high=MAX_LAYERS)
    kinds = model.kinds(fields, lambda index: used and window is not None and index >= first)
    if LayerKind.SLIDING in kinds and not used:
        raise ConfigError(f"{fields.where}: layer_types has sliding_attention, but use_sliding_window is not true")
    ropes = read_ropes(fields, kinds, RopeStyle(), model.spec.max_position)
    bias = fields.flag("attention_bias", False)
    return dataclasses.replace(
        model.spec,
        layers=model.layers(kinds, window, ropes, fields.where),
        qk_norm=True,
        attention_bias=bias,
        output_bias=bias,
    )
