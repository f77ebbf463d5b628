"""``gemma3_text``, and the text part of ``gemma3``: QK norm, two RoPE bases, five sliding layers to a global one."""

from __future__ import annotations

import dataclasses
import logging

from hkv_jax.errors import ConfigError
from hkv_jax.families.decoder import MAX_LAYERS, Defaults, read_dimensions, read_dtype
from hkv_jax.families.fields import Fields
from hkv_jax.families.gemma2 import gemma_traits
from hkv_jax.families.harmless import settle_unread
from hkv_jax.families.rope import RopeStyle, read_ropes
from hkv_jax.spec import ModelSpec

logger = logging.getLogger("hkv_jax.families")

TEXT_ARCHITECTURES = ("Gemma3ForCausalLM",)
ARCHITECTURES = ("Gemma3ForConditionalGeneration",)
TEXT_IGNORED = ("hidden_act",)
IGNORED = (
    *("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"),
    *("boi_token_id", "eoi_token_id", "image_token_id"),
)

_GLOBAL_EVERY = 6
_DEFAULTS = Defaults(
    vocab_size=262_208,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=131_072,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    tie_word_embeddings=True,
    bos_token_id=2,
    eos_token_id=(1,),
)
_ROPE = RopeStyle(theta=1_000_000.0, local_theta=10_000.0)


def read_text(fields: Fields) -> ModelSpec:
    """The model of a ``gemma3_text`` config."""
    model = read_dimensions(fields, _DEFAULTS, "gemma3_text")
    pattern = _read_pattern(fields)
    kinds = model.kinds(fields, lambda index: (index + 1) % pattern != 0)
    ropes = read_ropes(fields, kinds, _ROPE, model.spec.max_position)
    if fields.optional_number("attn_logit_softcapping", None) is not None:
        # Its attention never applies it, there or in the reference implementation.
        logger.warning("%s: attn_logit_softcapping has no effect in Gemma 3", fields.where)
    return dataclasses.replace(
        gemma_traits(fields, model),
        layers=model.layers(kinds, fields.optional_count("sliding_window", 4096), ropes, fields.where),
        final_soft_cap=fields.optional_number("final_logit_softcapping", None),
        qk_norm=True,
    )


def read(fields: Fields) -> ModelSpec:
    """The text model of a ``gemma3`` config; its outer object comes first on ids, data type and tied embeddings."""
    text = Fields(fields.mapping("text_config") or {}, f"{fields.where}: text_config")
    text.choice("model_type", "gemma3_text", ("gemma3_text",))
    text.raw("architectures")
    spec = read_text(text)
    settle_unread(text, "gemma3_text", TEXT_IGNORED)
    tied = fields.flag("tie_word_embeddings", _DEFAULTS.tie_word_embeddings)
    if "tie_word_embeddings" in text and tied != spec.tie_embeddings:
        raise ConfigError(
            f"{fields.where}: tie_word_embeddings is {tied} but {spec.tie_embeddings} in text_config; make them equal"
        )
    return dataclasses.replace(
        spec,
        architecture="gemma3",
        tie_embeddings=tied,
        dtype=read_dtype(fields) or spec.dtype,
        eos_token_ids=fields.token_ids("eos_token_id") or spec.eos_token_ids,
        bos_token_id=spec.bos_token_id if fields.raw("bos_token_id") is None else _read_bos(fields),
    )


def _read_pattern(fields: Fields) -> int:
    """Every how many layers one is global: both spellings are found, the underscored in saved configs."""
    new = fields.optional_count("sliding_window_pattern", None)
    old = fields.optional_count("_sliding_window_pattern", None)
    if new is not None and old is not None and new != old:
        raise ConfigError(
            f"{fields.where}: sliding_window_pattern is {new}, but _sliding_window_pattern is {old}; leave one out"
        )
    pattern = new or old or _GLOBAL_EVERY
    return min(pattern, MAX_LAYERS + 1)


def _read_bos(fields: Fields) -> int:
    value = fields.raw("bos_token_id")
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise fields.error("bos_token_id", "a token id or null")
    return value
