"""Absent fields: what the config classes of transformers 5.23 have, written down."""

from __future__ import annotations

from typing import Any

import pytest

from hkv_jax.families import SUPPORTED, model_spec_from_config
from hkv_jax.spec import Activation, LayerKind, Llama3Scaling, ModelSpec, RopeSpec

GLOBAL, SLIDING = LayerKind.GLOBAL, LayerKind.SLIDING
CWM_ROPE = RopeSpec(1_000_000.0, llama3=Llama3Scaling(16.0, 1.0, 4.0, 8192))

# vocabulary, hidden, MLP, layers, heads, kv heads, head dim, positions, eps, activation, tied, bos, eos
SIZES: dict[str, tuple[Any, ...]] = {
    "gemma3_text": (262_208, 2304, 9216, 26, 8, 4, 256, 131_072, 1e-6, "gelu_tanh", True, 2, (1,)),
    "gemma3": (262_208, 2304, 9216, 26, 8, 4, 256, 131_072, 1e-6, "gelu_tanh", True, 2, (1,)),
    "gemma2": (256_000, 2304, 9216, 26, 8, 4, 256, 8192, 1e-6, "gelu_tanh", True, 2, (1,)),
    "llama": (32_000, 4096, 11_008, 32, 32, 32, 128, 2048, 1e-6, "silu", False, 1, (2,)),
    "mistral": (32_000, 4096, 14_336, 32, 32, 8, 128, 131_072, 1e-6, "silu", False, 1, (2,)),
    "qwen3": (151_936, 4096, 22_016, 32, 32, 32, 128, 32_768, 1e-6, "silu", False, None, ()),
    "cwm": (128_256, 6144, 21_504, 64, 48, 8, 128, 131_072, 1e-5, "silu", False, 128_000, (128_001, 128_008, 128_009)),
}
# window, indices of the global layers, RoPE of global and of sliding layers
ATTENTION: dict[str, tuple[int | None, list[int], RopeSpec | None, RopeSpec | None]] = {
    "gemma3_text": (4096, [5, 11, 17, 23], RopeSpec(1_000_000.0), RopeSpec(10_000.0)),
    "gemma3": (4096, [5, 11, 17, 23], RopeSpec(1_000_000.0), RopeSpec(10_000.0)),
    "gemma2": (4096, list(range(1, 26, 2)), RopeSpec(10_000.0), RopeSpec(10_000.0)),
    "llama": (None, list(range(32)), RopeSpec(10_000.0), None),
    "mistral": (4096, [], None, RopeSpec(10_000.0)),
    "qwen3": (None, list(range(32)), RopeSpec(10_000.0), None),
    "cwm": (8192, list(range(0, 64, 4)), CWM_ROPE, CWM_ROPE),
}
# fields of ModelSpec that are not what they are in a plain Llama
TRAITS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sandwich_norm": True, "unit_offset_norm": True, "qk_norm": True, "embedding_scale": 48.0},
    "gemma3": {"sandwich_norm": True, "unit_offset_norm": True, "qk_norm": True, "embedding_scale": 48.0},
    "gemma2": {
        "sandwich_norm": True,
        "unit_offset_norm": True,
        "embedding_scale": 48.0,
        "attention_soft_cap": 50.0,
        "final_soft_cap": 30.0,
    },
    "llama": {},
    "mistral": {},
    "qwen3": {"qk_norm": True},
    "cwm": {},
}
PLAIN = {
    "attention_soft_cap": None,
    "final_soft_cap": None,
    "embedding_scale": 1.0,
    "unit_offset_norm": False,
    "sandwich_norm": False,
    "qk_norm": False,
    "attention_bias": False,
    "output_bias": False,
    "mlp_bias": False,
}


def default_spec(model_type: str) -> ModelSpec:
    return model_spec_from_config({"model_type": model_type})


def test_the_tables_cover_every_family() -> None:
    assert set(SUPPORTED) == set(SIZES) == set(ATTENTION) == set(TRAITS)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_sizes(model_type: str) -> None:
    spec = default_spec(model_type)
    assert spec.architecture == model_type
    assert {(layer.num_kv_heads, layer.head_dim) for layer in spec.layers} == {SIZES[model_type][5:7]}
    found = (
        *(spec.vocab_size, spec.hidden_size, spec.intermediate_size, spec.num_layers, spec.num_heads),
        *(spec.layers[0].num_kv_heads, spec.layers[0].head_dim, spec.max_position, spec.norm_eps),
        *(str(spec.activation), spec.tie_embeddings, spec.bos_token_id, spec.eos_token_ids),
    )
    assert found == SIZES[model_type]
    assert spec.dtype == "float32"


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_attention(model_type: str) -> None:
    spec = default_spec(model_type)
    window, globals_, global_rope, sliding_rope = ATTENTION[model_type]
    assert [index for index, layer in enumerate(spec.layers) if layer.kind is GLOBAL] == globals_
    assert {layer.window for layer in spec.layers if layer.kind is SLIDING} == ({window} if window else set())
    assert {layer.rope for layer in spec.layers if layer.kind is GLOBAL} == ({global_rope} if global_rope else set())
    assert {layer.rope for layer in spec.layers if layer.kind is SLIDING} == ({sliding_rope} if sliding_rope else set())


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_traits(model_type: str) -> None:
    spec = default_spec(model_type)
    assert {name: getattr(spec, name) for name in PLAIN} == PLAIN | TRAITS[model_type]
    # 256 ** -0.5 by query_pre_attn_scalar in Gemma, by head_dim elsewhere (128).
    assert spec.attention_scale == (256**-0.5 if model_type.startswith("gemma") else 128**-0.5)


@pytest.mark.parametrize(
    ("name", "activation"), [("silu", "silu"), ("swish", "silu"), ("gelu_pytorch_tanh", "gelu_tanh")]
)
def test_activations(name: str, activation: str) -> None:
    assert model_spec_from_config({"model_type": "llama", "hidden_act": name}).activation is Activation(activation)
    assert model_spec_from_config({"model_type": "gemma2", "hidden_activation": name}).activation == activation
