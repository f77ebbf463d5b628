"""The tiny models of the golden data: one ``config.json`` a family, and what must be visible in its outputs.

Owns: shapes, spellings and the ways each config is damaged on purpose. Must never: need more than the standard library.

The configs are written as real checkpoints of the family are: some in the spelling of transformers 4 (``rope_theta``,
``rope_scaling``, ``rope_local_base_freq``, sparse fields), some in that of transformers 5 (``rope_parameters``,
``layer_types``), so that reading both is tested by the same outputs.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Config = dict[str, Any]
Damage = Callable[[Config], None]

WINDOW = 16
NUM_LAYERS = 8
MAX_POSITION = 8192
# Llama 3's interpolation at a scale at which 16 head dims and 64 positions show all of its three ranges.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One tiny checkpoint.

    ``quiet_ids`` are never generated (their embedding rows are small): padding, ends of sequence, placeholders.
    ``unit_offset`` tells how its RMSNorm reads weights; ``damages`` are edits of the text config that must change the
    logits. ``prefix`` is put before the names of the text model's tensors.
    """

    name: str
    config: Config
    generation_config: Config
    quiet_ids: tuple[int, ...]
    damages: Mapping[str, Damage]
    unit_offset: bool = False
    prefix: str = ""

    @property
    def text_config(self) -> Config:
        """The part of the config that describes the language model."""
        text: Config = self.config.get("text_config", self.config)
        return text

    def damaged(self, name: str) -> Config:
        """The whole config with one damage done to its text part."""
        config = copy.deepcopy(self.config)
        self.damages[name](config.get("text_config", config))
        return config


def _set(**fields: Any) -> Damage:
    return lambda config: config.update(fields)


def _swap_nested_thetas(config: Config) -> None:
    rope = config["rope_parameters"]
    full, sliding = rope["full_attention"], rope["sliding_attention"]
    full["rope_theta"], sliding["rope_theta"] = sliding["rope_theta"], full["rope_theta"]


def _swap_flat_thetas(config: Config) -> None:
    config["rope_theta"], config["rope_local_base_freq"] = config["rope_local_base_freq"], config["rope_theta"]


def _drop_linear_factor(config: Config) -> None:
    theta = config["rope_parameters"]["full_attention"]["rope_theta"]
    config["rope_parameters"]["full_attention"] = {"rope_type": "default", "rope_theta": theta}


WINDOWS: dict[str, Damage] = {
    "window_15": _set(sliding_window=WINDOW - 1),
    "window_17": _set(sliding_window=WINDOW + 1),
    "all_global": _set(sliding_window=MAX_POSITION),
}


def _shape(**fields: Any) -> Config:
    return {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": MAX_POSITION,
        "initializer_range": 0.02,
        "use_cache": True,
        **fields,
    }


def _gemma3_text() -> Family:
    pattern = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
    config = _shape(
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        dtype="float32",
        num_key_value_heads=1,
        head_dim=32,
        hidden_activation="gelu_pytorch_tanh",
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        _sliding_window_pattern=6,
        layer_types=pattern,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        use_bidirectional_attention=False,
        attention_bias=False,
        attention_dropout=0.0,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=[1, 106],
        pad_token_id=0,
    )
    damages = {
        **WINDOWS,
        "swapped_thetas": _swap_nested_thetas,
        "no_linear_factor": _drop_linear_factor,
        "scale_from_head_dim": _set(query_pre_attn_scalar=32),
        "pattern_shifted": _set(layer_types=pattern[1:] + pattern[:1]),
    }
    generation = {"do_sample": True, "eos_token_id": [1, 106], "top_k": 64, "top_p": 0.95}
    return Family("gemma3_text", config, generation, (0, 1, 106), damages, unit_offset=True)


def _gemma3() -> Family:
    text = _shape(
        model_type="gemma3_text",
        vocab_size=264,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        rope_theta=500000.0,
        rope_local_base_freq=5000.0,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    )
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 260,
        "eoi_token_index": 261,
        "image_token_index": 262,
        "eos_token_id": [1, 106],
        "initializer_range": 0.02,
        "mm_tokens_per_image": 1,
        "model_type": "gemma3",
        "text_config": text,
        "torch_dtype": "float32",
        "vision_config": {
            "hidden_size": 8,
            "image_size": 8,
            "intermediate_size": 8,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "patch_size": 8,
            "vision_use_head": False,
        },
    }
    damages = {
        **WINDOWS,
        "swapped_thetas": _swap_flat_thetas,
        "no_linear_factor": lambda config: config.pop("rope_scaling"),
        "scale_from_head_dim": _set(query_pre_attn_scalar=32),
        "pattern_5": _set(sliding_window_pattern=5),
    }
    generation = {"cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [1, 106], "pad_token_id": 0}
    return Family(
        "gemma3",
        config,
        {**generation, "bos_token_id": 2, "top_k": 64, "top_p": 0.95},
        (0, 1, 106, 260, 261, 262),
        damages,
        unit_offset=True,
        prefix="language_model.",
    )


def _gemma2() -> Family:
    config = _shape(
        architectures=["Gemma2ForCausalLM"],
        model_type="gemma2",
        torch_dtype="float32",
        head_dim=32,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        rope_theta=10000.0,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0,
        cache_implementation="hybrid",
        attention_bias=False,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    damages = {
        **WINDOWS,
        "no_attention_soft_cap": _set(attn_logit_softcapping=None),
        "no_final_soft_cap": _set(final_logit_softcapping=None),
        "scale_from_head_dim": _set(query_pre_attn_scalar=32),
        "pattern_shifted": _set(layer_types=["full_attention", "sliding_attention"] * (NUM_LAYERS // 2)),
    }
    generation = {"bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 107], "pad_token_id": 0}
    return Family("gemma2", config, generation, (0, 1, 107), damages, unit_offset=True)


def _llama() -> Family:
    config = _shape(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        torch_dtype="float32",
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=LLAMA3_SCALING,
        attention_bias=True,
        mlp_bias=True,
        attention_dropout=0.0,
        pretraining_tp=1,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=[5, 6, 9],
    )
    damages = {
        "no_llama3_scaling": lambda config: config.pop("rope_scaling"),
        "linear_scaling_instead": _set(rope_scaling={"rope_type": "linear", "factor": 8.0}),
    }
    generation = {"bos_token_id": 2, "do_sample": True, "eos_token_id": [5, 6, 9], "temperature": 0.6, "top_p": 0.9}
    return Family("llama", config, generation, (5, 6, 9), damages)


def _mistral() -> Family:
    config = _shape(
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        torch_dtype="float32",
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        sliding_window=WINDOW,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    del config["head_dim"]  # the first Mistral's config has none: hidden_size / num_attention_heads
    damages = {**WINDOWS, "theta_1e6": _set(rope_theta=1000000.0)}
    return Family("mistral", config, {"bos_token_id": 1, "eos_token_id": 2}, (2,), damages)


def _qwen3() -> Family:
    config = _shape(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        dtype="float32",
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        sliding_window=WINDOW,
        use_sliding_window=False,
        max_window_layers=2,
        attention_bias=False,
        attention_dropout=0.0,
        tie_word_embeddings=True,
        bos_token_id=3,
        eos_token_id=5,
    )
    damages = {
        "window_used": _set(use_sliding_window=True),
        "theta_1e4": _set(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    }
    generation = {"do_sample": True, "eos_token_id": [5, 3], "pad_token_id": 3, "temperature": 0.6, "top_k": 20}
    return Family("qwen3", config, {**generation, "top_p": 0.95}, (3, 5), damages)


def _cwm() -> Family:
    pattern = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"] * (NUM_LAYERS // 4)
    config = _shape(
        architectures=["CwmForCausalLM"],
        model_type="cwm",
        dtype="float32",
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 10000.0, **LLAMA3_SCALING},
        sliding_window=WINDOW,
        layer_types=pattern,
        mlp_bias=False,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=4,
        eos_token_id=[5, 6],
    )
    damages = {
        **WINDOWS,
        "no_llama3_scaling": _set(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        "pattern_shifted": _set(layer_types=pattern[1:] + pattern[:1]),
    }
    return Family("cwm", config, {"bos_token_id": 4, "eos_token_id": [5, 6]}, (5, 6), damages)


FAMILIES: dict[str, Family] = {
    family.name: family for family in (_gemma3_text(), _gemma3(), _gemma2(), _llama(), _mistral(), _qwen3(), _cwm())
}
