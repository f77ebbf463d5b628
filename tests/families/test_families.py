"""Fields of each family: how layers, windows and traits follow from a config."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from hkv_jax.errors import ConfigError
from hkv_jax.families import model_spec_from_config
from hkv_jax.spec import LayerKind, ModelSpec, RopeSpec

FULL, SLIDING = "full_attention", "sliding_attention"


def spec_of(model_type: str, **fields: Any) -> ModelSpec:
    return model_spec_from_config({"model_type": model_type, "num_hidden_layers": 8, **fields})


def windows(spec: ModelSpec) -> list[int]:
    """The window of each layer, 0 for a global one."""
    return [layer.window or 0 for layer in spec.layers]


def pattern(spec: ModelSpec) -> str:
    return "".join("g" if layer.kind is LayerKind.GLOBAL else "s" for layer in spec.layers)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma2", "cwm"])
def test_layer_types_decide(model_type: str) -> None:
    types = [FULL, SLIDING, SLIDING, FULL, SLIDING, FULL, FULL, SLIDING]
    spec = spec_of(model_type, layer_types=types, sliding_window=16)
    assert windows(spec) == [0, 16, 16, 0, 16, 0, 0, 16]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "sssssgss"),
        ({"sliding_window_pattern": 3}, "ssgssgss"),
        ({"_sliding_window_pattern": 2}, "sgsgsgsg"),
        ({"sliding_window_pattern": 4, "_sliding_window_pattern": 4}, "sssgsssg"),
        ({"sliding_window_pattern": 1}, "gggggggg"),
        ({"sliding_window_pattern": 100}, "ssssssss"),
        ({"sliding_window_pattern": 2, "layer_types": [FULL] * 8}, "gggggggg"),
        ({"layer_types": ["attention"] * 8}, "gggggggg"),
    ],
)
def test_patterns_of_gemma3(fields: dict[str, Any], expected: str) -> None:
    assert pattern(spec_of("gemma3_text", **fields)) == expected


def test_patterns_that_disagree() -> None:
    with pytest.raises(ConfigError, match="sliding_window_pattern is 2, but _sliding_window_pattern is 3"):
        spec_of("gemma3_text", sliding_window_pattern=2, _sliding_window_pattern=3)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"use_sliding_window": False, "sliding_window": 16}, "gggggggg"),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 6}, "ggggggss"),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "ssssssss"),
        ({"use_sliding_window": True, "sliding_window": 16}, "gggggggg"),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, "gggggggg"),
        ({"use_sliding_window": True, "layer_types": [FULL, SLIDING] * 4, "max_window_layers": 8}, "gsgsgsgs"),
        ({"layer_types": [FULL] * 8}, "gggggggg"),
    ],
)
def test_windows_of_qwen3(fields: dict[str, Any], expected: str) -> None:
    assert pattern(spec_of("qwen3", **fields)) == expected


def test_mistral_is_sliding_unless_it_has_no_window() -> None:
    assert windows(spec_of("mistral", sliding_window=16)) == [16] * 8
    assert windows(spec_of("mistral", sliding_window=None)) == [0] * 8
    assert windows(spec_of("mistral", sliding_window=16, layer_types=[SLIDING] * 8)) == [16] * 8


def test_cwm_is_global_in_every_fourth_layer_from_the_first() -> None:
    assert windows(spec_of("cwm", sliding_window=16)) == [0, 16, 16, 16, 0, 16, 16, 16]


@pytest.mark.parametrize(
    ("model_type", "fields", "says"),
    [
        ("mistral", {"layer_types": [SLIDING, FULL] * 4}, "layer_types is .*mistral does not mix kinds"),
        ("mistral", {"layer_types": [FULL] * 8}, "sliding_attention in every layer"),
        ("mistral", {"layer_types": [SLIDING] * 8, "sliding_window": None}, "full_attention in every layer"),
        ("llama", {"layer_types": [SLIDING] * 8}, "layer_types is .*model_type cwm"),
        ("llama", {"sliding_window": 16}, "sliding_window .*model_type cwm"),
        ("qwen3", {"layer_types": [SLIDING] * 8}, "use_sliding_window is not true"),
        ("qwen3", {"layer_types": [SLIDING] * 8, "use_sliding_window": True, "sliding_window": None}, "is null"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window is null"),
        ("cwm", {"sliding_window": 0}, "sliding_window is null"),
        ("gemma2", {"sliding_window": 0}, "sliding_window is 0; accepted: an integer from 1"),
        ("gemma2", {"sliding_window": -16}, "sliding_window is -16"),
        ("gemma2", {"sliding_window": 16.0}, r"sliding_window is 16\.0"),
        ("gemma2", {"layer_types": [FULL] * 7}, "layer_types has 7 entries, but num_hidden_layers is 8"),
        ("gemma2", {"layer_types": [FULL] * 7 + ["chunked_attention"]}, "layer_types is .*accepted: a list of"),
        ("gemma2", {"layer_types": [FULL] * 7 + [["x"]]}, "layer_types is .*accepted: a list of"),
        ("gemma2", {"layer_types": FULL}, "layer_types is .*accepted: a list of"),
    ],
)
def test_layers_that_cannot_be(model_type: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        spec_of(model_type, **fields)


def test_gemma_scales_and_caps() -> None:
    spec = spec_of("gemma2", query_pre_attn_scalar=144, hidden_size=64, attn_logit_softcapping=20, head_dim=32)
    assert spec.attention_scale == 144**-0.5
    assert spec.embedding_scale == 8.0
    assert (spec.attention_soft_cap, spec.final_soft_cap) == (20.0, 30.0)
    spec = spec_of("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (spec.attention_soft_cap, spec.final_soft_cap) == (None, None)
    assert spec_of("gemma3_text", final_logit_softcapping=25.0).final_soft_cap == 25.0


def test_gemma3_never_caps_attention(caplog: pytest.LogCaptureFixture) -> None:
    """Its attention in the reference implementation does not use the field, which it has from Gemma 2."""
    assert spec_of("gemma3_text", attn_logit_softcapping=50.0).attention_soft_cap is None
    assert "attn_logit_softcapping has no effect" in caplog.text


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_attention_bias_is_on_all_four_projections(model_type: str) -> None:
    spec = spec_of(model_type, attention_bias=True)
    assert spec.attention_bias and spec.output_bias


@pytest.mark.parametrize("model_type", ["llama", "cwm"])
def test_mlp_bias(model_type: str) -> None:
    assert spec_of(model_type, mlp_bias=True).mlp_bias


def test_heads_follow_each_other() -> None:
    spec = spec_of("llama", hidden_size=64, num_attention_heads=4)
    assert (spec.layers[0].num_kv_heads, spec.layers[0].head_dim, spec.attention_scale) == (4, 16, 0.25)
    spec = spec_of("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    assert (spec.layers[0].num_kv_heads, spec.layers[0].head_dim) == (2, 8)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"num_key_value_heads": 5},
            "num_key_value_heads is 5; accepted: a divisor of num_attention_heads, which is 32",
        ),
        ({"hidden_size": 65, "num_attention_heads": 4}, "hidden_size 65 is no multiple of num_attention_heads 4"),
        ({"head_dim": 15}, "head_dim is 15; RoPE needs an even number"),
        ({"vocab_size": "32000"}, "vocab_size is '32000'; accepted: an integer from 1"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; accepted: an integer from 1 to 4096"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; accepted: a number above 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: silu, swish, gelu_pytorch_tanh"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; accepted: true or false"),
        ({"bos_token_id": "x"}, "bos_token_id is 'x'"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id is"),
        ({"dtype": "int8"}, "dtype is 'int8'; accepted: float32, bfloat16, float16"),
        ({"torch_dtype": "auto"}, "torch_dtype is 'auto'"),
    ],
)
def test_values_that_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        model_spec_from_config({"model_type": "llama", **fields})


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_data_types(fields: dict[str, Any], dtype: str) -> None:
    assert spec_of("llama", **fields).dtype == dtype


def gemma3(text: dict[str, Any] | None = None, **outer: Any) -> ModelSpec:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **(text or {})}, **outer}
    return model_spec_from_config(config)


def test_gemma3_is_its_text_part() -> None:
    """The sparse config of the 4B checkpoint: nearly all of it is defaults."""
    spec = gemma3(
        {
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        architectures=["Gemma3ForConditionalGeneration"],
        boi_token_index=255_999,
        eoi_token_index=256_000,
        eos_token_id=[1, 106],
        image_token_index=262_144,
        initializer_range=0.02,
        mm_tokens_per_image=256,
        torch_dtype="bfloat16",
        transformers_version="4.50.0.dev0",
        vision_config={"hidden_size": 1152, "model_type": "siglip_vision_model"},
    )
    assert (spec.architecture, spec.num_layers, spec.hidden_size, spec.num_heads) == ("gemma3", 34, 2560, 8)
    assert (spec.eos_token_ids, spec.dtype, spec.tie_embeddings) == ((1, 106), "bfloat16", True)
    assert [index for index, window in enumerate(windows(spec)) if not window] == [5, 11, 17, 23, 29]
    assert {layer.window for layer in spec.layers} == {None, 1024}
    assert spec.layers[5].rope == RopeSpec(1_000_000.0, linear_factor=8.0)
    assert spec.layers[0].rope == RopeSpec(10_000.0)


def test_the_outer_object_of_gemma3_comes_first() -> None:
    spec = gemma3({"eos_token_id": 5, "bos_token_id": 6, "dtype": "float32"}, eos_token_id=7, dtype="bfloat16")
    assert (spec.eos_token_ids, spec.bos_token_id, spec.dtype) == ((7,), 6, "bfloat16")
    assert gemma3({"tie_word_embeddings": False}, tie_word_embeddings=False).tie_embeddings is False
    assert gemma3(tie_word_embeddings=False).tie_embeddings is False


@pytest.mark.parametrize(
    ("text", "outer", "says"),
    [
        ({"tie_word_embeddings": False}, {}, "tie_word_embeddings is True but False in text_config"),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, "False but True in text_config"),
        ({"model_type": "gemma2"}, {}, "text_config: model_type is 'gemma2'; accepted: gemma3_text"),
        ({"num_experts": 4}, {}, r"text_config: num_experts \(4\) is not supported"),
        ({}, {"num_experts": 4}, r"config\.json: num_experts \(4\) is not supported for gemma3,"),
        ({}, {"text_config": [1]}, "text_config is .*accepted: an object or null"),
        ({}, {"bos_token_id": -1}, "bos_token_id is -1"),
    ],
)
def test_gemma3_configs_that_cannot_be(text: dict[str, Any], outer: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        gemma3(text, **outer)


def test_one_log_line_for_what_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hkv_jax"):
        spec_of("llama", attention_dropout=0.1, use_cache=True, initializer_range=0.02, clip_qkv=None)
    ignored = "attention_dropout, clip_qkv, initializer_range, use_cache"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"config.json: ignored, since they change nothing here: {ignored}"]
    assert caplog.records[0].name == "hkv_jax.families"
