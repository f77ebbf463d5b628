"""Model folders: which files are read, whose word counts, and what is refused before anything is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hkv_jax.errors import ConfigError
from hkv_jax.families import SUPPORTED, model_spec_from_config, read_generation_defaults, read_model_spec

LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 100, "eos_token_id": 7}


def folder_with(folder: Path, config: Any, generation: Any = None) -> Path:
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        if content is not None:
            text = content if isinstance(content, (str, bytes)) else json.dumps(content)
            (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, r"config\.json: cannot be read \(No such file"),
        ("{", r"config\.json: not valid JSON"),
        ("[]", r"config\.json: must hold one JSON object, holds a list"),
        ('{"model_type": "llama", "rms_norm_eps": NaN}', "NaN is not a JSON number"),
        ('{"model_type": "llama", "model_type": "cwm"}', "'model_type' is there twice"),
        (b"\xff\xfe", "not valid JSON"),
        ("[" * 100_000, "nested too deep"),
        ({}, "model_type is None; accepted: .*gemma3_text.*qwen3"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; accepted: cwm, gemma2, gemma3, "),
        ({"model_type": ["llama"]}, "model_type is"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path: Path, config: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_model_spec(folder_with(tmp_path, config))


def test_a_model_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent is not a folder"):
        read_model_spec(tmp_path / "absent")


@pytest.mark.parametrize(
    ("generation", "eos"),
    [
        (None, (7,)),
        ({}, (7,)),
        ({"eos_token_id": None}, (7,)),
        ({"eos_token_id": 5}, (5,)),
        ({"eos_token_id": [5, 9, 5]}, (5, 9)),
        ({"eos_token_id": [5, 100, -1]}, (5,)),
    ],
)
def test_ends_of_generation(tmp_path: Path, generation: Any, eos: tuple[int, ...]) -> None:
    assert read_model_spec(folder_with(tmp_path, LLAMA, generation)).eos_token_ids == eos


def test_ids_outside_the_vocabulary_are_told(caplog: pytest.LogCaptureFixture) -> None:
    assert model_spec_from_config(LLAMA, {"eos_token_id": [5, 100]}).eos_token_ids == (5,)
    assert "eos_token_id [100] is outside the vocabulary of 100" in caplog.text


def test_a_config_without_a_data_type_takes_that_of_the_weights(tmp_path: Path) -> None:
    folder_with(tmp_path, LLAMA)
    assert read_model_spec(tmp_path).dtype == "float32"
    weights = {"w": np.zeros((4, 4), ml_dtypes.bfloat16), "norm": np.zeros(4, np.float32)}
    save_file(weights, tmp_path / "model.safetensors")
    assert read_model_spec(tmp_path).dtype == "bfloat16"
    folder_with(tmp_path, LLAMA | {"dtype": "float32"})
    assert read_model_spec(tmp_path).dtype == "float32"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("quantization_config", {"quant_method": "gptq"}), ("num_experts", 8), ("num_local_experts", 8)),
        *(("logits_scaling", 8.0), ("residual_multiplier", 0.2), ("attention_multiplier", 0.1), ("clip_qkv", 8.0)),
        *(("is_causal", False), ("use_bidirectional_attention", True), ("per_layer_config", {"0": {"head_dim": 8}})),
        *(("pruned_heads", {"0": [1]}), ("add_cross_attention", True), ("is_encoder_decoder", True)),
        *(("rope_interleaved", True), ("use_qk_norm", True), ("some_new_field", False)),
    ],
)
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_fields_that_may_change_the_result_are_named(model_type: str, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: {field} (\(|is )"):
        model_spec_from_config({"model_type": model_type, field: value})
    model_spec_from_config({"model_type": model_type, field: None})


@pytest.mark.parametrize(
    "fields",
    [
        # As the small Llama of the project's second real model was published.
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "is_llama_config": True,
            "rope_interleaved": False,
            "pretraining_tp": 1,
            "rope_scaling": None,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
        # What a config class writes in full.
        {
            "_name_or_path": "",
            "output_hidden_states": False,
            "output_attentions": False,
            "return_dict": True,
            "chunk_size_feed_forward": 0,
            "is_encoder_decoder": False,
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "problem_type": None,
            "pad_token_id": 0,
        },
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "unsloth_fixed": True},
    ],
)
def test_fields_that_change_nothing_pass(fields: dict[str, Any]) -> None:
    assert model_spec_from_config({**LLAMA, **fields}) == model_spec_from_config(LLAMA)


@pytest.mark.parametrize("architectures", [["LlamaForSequenceClassification"], "LlamaForCausalLM", [], [3], [[]]])
def test_other_heads_are_refused(architectures: object) -> None:
    with pytest.raises(ConfigError, match=r"architectures is .*accepted: a list with LlamaForCausalLM"):
        model_spec_from_config({**LLAMA, "architectures": architectures})


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        model_spec_from_config({**LLAMA, "some_new_field": ["x" * 1000] * 1000})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("generation", "defaults"),
    [
        (None, {}),
        ({"eos_token_id": 3, "_from_model_config": True, "transformers_version": "5.0"}, {}),
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {"top_k": 64, "top_p": 0.95}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": None, "temperature": 0.7, "top_k": None}, {"temperature": 0.7}),
        (
            {"min_p": 0.1, "repetition_penalty": 1.2, "max_new_tokens": 9},
            {"min_p": 0.1, "repetition_penalty": 1.2, "max_tokens": 9},
        ),
    ],
)
def test_sampling_defaults(tmp_path: Path, generation: Any, defaults: dict[str, Any]) -> None:
    assert read_generation_defaults(folder_with(tmp_path, LLAMA, generation)) == defaults


@pytest.mark.parametrize(
    ("generation", "says"),
    [
        ({"temperature": -1}, r"generation_config\.json: temperature is -1"),
        ({"top_p": 0}, r"generation_config\.json: top_p is 0"),
        ({"top_k": 1.5}, r"generation_config\.json: top_k is 1\.5"),
        ({"top_k": "64"}, "top_k is '64'; accepted: a number"),
        ({"temperature": True}, "temperature is True; accepted: a number"),
        ({"max_new_tokens": 0}, "max_tokens is 0"),
        ({"do_sample": "no"}, "do_sample is 'no'; accepted: true or false"),
        ("[]", "must hold one JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_sampling_defaults_that_cannot_be(tmp_path: Path, generation: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_generation_defaults(folder_with(tmp_path, LLAMA, generation))


def test_other_ways_to_generate_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generation = {"num_beams": 4, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": [], "top_k": 5}
    assert read_generation_defaults(folder_with(tmp_path, LLAMA, generation)) == {"top_k": 5}
    assert "generation goes without: num_beams 4" in caplog.text
    assert "typical_p" not in caplog.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KNOWN = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("layer_types", "sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "use_sliding_window"),
    *("max_window_layers", "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "rms_norm_eps"),
    *("eos_token_id", "bos_token_id", "tie_word_embeddings", "text_config", "architectures", "dtype", "torch_dtype"),
    *(
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "hidden_act",
        "hidden_activation",
        "is_causal",
        "pruned_heads",
    ),
)


@given(model_type=st.sampled_from(SUPPORTED), fields=st.dictionaries(st.sampled_from(KNOWN), JSON, max_size=4))
def test_any_value_is_read_or_refused(model_type: str, fields: dict[str, Any]) -> None:
    """No value whatever raises anything but a ConfigError."""
    try:
        spec = model_spec_from_config({"num_hidden_layers": 4, **fields, "model_type": model_type}, fields)
    except ConfigError:
        return
    assert spec.num_layers >= 1
    assert spec.kv_groups()
