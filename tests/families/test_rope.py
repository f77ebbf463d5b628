"""RoPE in every spelling: old and new, flat and nested, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from hkv_jax.errors import ConfigError
from hkv_jax.families import model_spec_from_config
from hkv_jax.spec import LayerKind, Llama3Scaling, RopeSpec

FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = {"rope_type": "linear", "factor": 8.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALING = Llama3Scaling(8.0, 1.0, 4.0, 8192)


def ropes(model_type: str, **fields: Any) -> dict[LayerKind, RopeSpec]:
    spec = model_spec_from_config({"model_type": model_type, "num_hidden_layers": 8, **fields})
    found: dict[LayerKind, set[RopeSpec]] = {}
    for layer in spec.layers:
        found.setdefault(layer.kind, set()).add(layer.rope)
    assert all(len(specs) == 1 for specs in found.values())
    return {kind: specs.pop() for kind, specs in found.items()}


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 5e5}, RopeSpec(5e5)),
        ({"rope_theta": 500_000}, RopeSpec(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeSpec(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": LINEAR}, RopeSpec(5e5, linear_factor=8.0)),
        ({"rope_scaling": {"type": "linear", "factor": 8}}, RopeSpec(1e4, linear_factor=8.0)),
        ({"rope_scaling": {"type": "linear", **LINEAR}}, RopeSpec(1e4, linear_factor=8.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, RopeSpec(5e5, llama3=SCALING)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeSpec(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5}}, RopeSpec(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, RopeSpec(5e5, llama3=SCALING)),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}, "rope_theta": 5e5}, RopeSpec(5e5, llama3=SCALING)),
        ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3}, RopeSpec(1e4, llama3=SCALING)),
        ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 1.0}}, RopeSpec(1e4, linear_factor=8.0)),
        ({"rope_scaling": {"rope_type": "default", "factor": 1.0}}, RopeSpec(1e4)),
        ({"rope_parameters": {}}, RopeSpec(1e4)),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_one_rope_for_all_layers(model_type: str, fields: dict[str, Any], rope: RopeSpec) -> None:
    assert ropes(model_type, **fields) == {LayerKind.GLOBAL: rope}


def test_the_original_length_of_llama3_follows_the_longest_sequence() -> None:
    scaling = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    found = ropes("llama", rope_scaling=scaling, max_position_embeddings=4096)[LayerKind.GLOBAL].llama3
    assert found is not None and found.original_max_position == 4096
    outside = ropes("llama", rope_scaling=scaling, original_max_position_embeddings=64)[LayerKind.GLOBAL].llama3
    assert outside is not None and outside.original_max_position == 64


@pytest.mark.parametrize("model_type", ["gemma2", "cwm"])
def test_flat_parameters_are_for_both_kinds(model_type: str) -> None:
    rope = RopeSpec(5e5, linear_factor=8.0)
    found = ropes(model_type, rope_parameters={**LINEAR, "rope_theta": 5e5})
    assert found == {LayerKind.GLOBAL: rope, LayerKind.SLIDING: rope}


@pytest.mark.parametrize("model_type", ["gemma2", "cwm", "gemma3_text"])
def test_nested_parameters(model_type: str) -> None:
    nested = {FULL: {**LLAMA3, "rope_theta": 5e5}, SLIDING: {"rope_type": "default", "rope_theta": 5e3}}
    assert ropes(model_type, rope_parameters=nested) == {
        LayerKind.GLOBAL: RopeSpec(5e5, llama3=SCALING),
        LayerKind.SLIDING: RopeSpec(5e3),
    }


@pytest.mark.parametrize(
    ("fields", "global_rope", "sliding_rope"),
    [
        ({}, RopeSpec(1e6), RopeSpec(1e4)),
        ({"rope_theta": 5e5, "rope_local_base_freq": 5e3}, RopeSpec(5e5), RopeSpec(5e3)),
        ({"rope_scaling": LINEAR}, RopeSpec(1e6, linear_factor=8.0), RopeSpec(1e4)),
        ({"rope_parameters": {FULL: LINEAR}}, RopeSpec(1e6, linear_factor=8.0), RopeSpec(1e4)),
        ({"rope_parameters": {SLIDING: {"rope_theta": 7.0}}, "rope_theta": 5e5}, RopeSpec(5e5), RopeSpec(7.0)),
        ({"rope_parameters": {FULL: LINEAR}, "rope_theta": 5e5}, RopeSpec(5e5, linear_factor=8.0), RopeSpec(1e4)),
        ({"rope_scaling": {FULL: LINEAR, SLIDING: {}}}, RopeSpec(1e6, linear_factor=8.0), RopeSpec(1e4)),
    ],
)
def test_gemma3_has_two(fields: dict[str, Any], global_rope: RopeSpec, sliding_rope: RopeSpec) -> None:
    assert ropes("gemma3_text", **fields) == {LayerKind.GLOBAL: global_rope, LayerKind.SLIDING: sliding_rope}


def test_cwm_scales_unless_told_otherwise() -> None:
    scaled = RopeSpec(1e6, llama3=Llama3Scaling(16.0, 1.0, 4.0, 8192))
    assert set(ropes("cwm").values()) == {scaled}
    assert set(ropes("cwm", rope_theta=1e6, rope_scaling=None).values()) == {scaled}
    assert set(ropes("cwm", rope_parameters={"rope_type": "default", "rope_theta": 1e5}).values()) == {RopeSpec(1e5)}
    # A base that the class would drop, together with a scaling nobody asked for.
    with pytest.raises(ConfigError, match=r"rope_theta is 1000000\.0, but rope_theta of config\.json is 10000\.0"):
        ropes("cwm", rope_theta=1e4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type is 'yarn'; accepted: default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type is 'longrope'"),
        ({"rope_scaling": {"rope_type": 7}}, "rope_type is 7"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type is"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "type is 'linear', but rope_type is 'llama3'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None; accepted: a number above 0"),
        ({"rope_scaling": {**LINEAR, "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {**LINEAR, "factor": "8"}}, "factor is '8'"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor is 1.0; accepted: .*above low_freq"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor is None"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0"),
        (
            {"rope_scaling": {"rope_type": "default", "factor": 8.0}},
            r"factor \(8\.0\) is not supported with .* default",
        ),
        ({"rope_scaling": {**LINEAR, "mrope_section": [1]}}, r"mrope_section \(\[1\]\) is not supported"),
        ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor \(0\.5\)"),
        ({"rope_scaling": LINEAR, "rope_parameters": LLAMA3}, "rope_scaling and rope_parameters disagree"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "leave one out"),
        ({"rope_theta": 0}, "rope_theta is 0; accepted: a number above 0"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_parameters: rope_theta is None"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; accepted: an object or null"),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
            "original_max_position_embeddings is 8192, but",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; accepted: null or 1\.0"),
        (
            {"rope_parameters": {FULL: LINEAR}, "original_max_position_embeddings": 64},
            "original_max_position_embeddings must be inside",
        ),
        ({"rope_parameters": {SLIDING: LINEAR}}, "nothing for full_attention"),
        ({"rope_parameters": {FULL: None}}, "nothing for full_attention; layers without RoPE"),
        ({"rope_parameters": {FULL: 3}}, "full_attention is 3; accepted: an object or null"),
        ({"rope_parameters": {FULL: LINEAR, "rope_theta": 5.0}}, "rope_theta stands beside full_attention"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ropes("llama", **fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "one object for each of full_attention and"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "call it rope_type"),
        ({"rope_local_base_freq": 5e3, "rope_parameters": {SLIDING: {"rope_theta": 1e4}}}, "rope_local_base_freq of"),
        ({"rope_parameters": {SLIDING: None}}, "nothing for sliding_attention"),
    ],
)
def test_what_gemma3_refuses(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ropes("gemma3_text", **fields)
