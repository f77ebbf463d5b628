"""Names of tensors: by family, behind the prefixes of multimodal checkpoints, and those that are ignored."""

from __future__ import annotations

from typing import Any

import pytest

from hkv_jax.families import TensorNames, model_spec_from_config


def names_of(model_type: str, stored: tuple[str, ...] = (), **fields: Any) -> TensorNames:
    spec = model_spec_from_config({"model_type": model_type, **fields})
    return TensorNames.of_checkpoint(spec, stored)


PLAIN = {
    "attention_norm": "model.layers.1.input_layernorm.weight",
    "q": "model.layers.1.self_attn.q_proj.weight",
    "k": "model.layers.1.self_attn.k_proj.weight",
    "v": "model.layers.1.self_attn.v_proj.weight",
    "o": "model.layers.1.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.1.post_attention_layernorm.weight",
    "gate": "model.layers.1.mlp.gate_proj.weight",
    "up": "model.layers.1.mlp.up_proj.weight",
    "down": "model.layers.1.mlp.down_proj.weight",
}
QK_NORM = {
    "q_norm": "model.layers.1.self_attn.q_norm.weight",
    "k_norm": "model.layers.1.self_attn.k_norm.weight",
}
SANDWICH = {
    "post_attention_norm": "model.layers.1.post_attention_layernorm.weight",
    "mlp_norm": "model.layers.1.pre_feedforward_layernorm.weight",
    "post_mlp_norm": "model.layers.1.post_feedforward_layernorm.weight",
}
ATTENTION_BIAS = {f"{one}_bias": f"model.layers.1.self_attn.{one}_proj.bias" for one in "qkvo"}
MLP_BIAS = {f"{one}_bias": f"model.layers.1.mlp.{one}_proj.bias" for one in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("model_type", "fields", "names"),
    [
        ("llama", {}, PLAIN),
        ("mistral", {}, PLAIN),
        ("cwm", {"mlp_bias": True}, PLAIN | MLP_BIAS),
        ("llama", {"attention_bias": True, "mlp_bias": True}, PLAIN | ATTENTION_BIAS | MLP_BIAS),
        ("qwen3", {}, PLAIN | QK_NORM),
        ("gemma2", {}, PLAIN | SANDWICH),
        ("gemma3_text", {"attention_bias": True}, PLAIN | SANDWICH | QK_NORM | ATTENTION_BIAS),
    ],
)
def test_layers(model_type: str, fields: dict[str, Any], names: dict[str, str]) -> None:
    assert names_of(model_type, **fields).of_layer(1) == names


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_prefixes(prefix: str, head: str, tied: bool) -> None:
    embedding = f"{prefix}embed_tokens.weight"
    names = names_of("gemma3", ("model.vision_tower.x", embedding), tie_word_embeddings=tied)
    outside = {"embedding": embedding, "final_norm": f"{prefix}norm.weight"}
    assert names.outside_layers() == (outside if tied else outside | {"lm_head": head})
    assert names.of_layer(0)["q"] == f"{prefix}layers.0.self_attn.q_proj.weight"
    assert names.tied_head == (head if tied else None)
    assert names.is_ignored(head) is tied


def test_without_an_embedding_the_plain_names_are_missed() -> None:
    assert names_of("gemma3").outside_layers()["embedding"] == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("vision_tower.vision_model.embeddings.patch_embedding.weight", True),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias", True),
        ("multi_modal_projector.mm_input_projection_weight", True),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("rotary_emb.inv_freq", True),
        ("model.layers.0.self_attn.q_proj.weight_scale", False),
        ("model.layers.2.self_attn.q_proj.weight", False),
        ("model.layers.0.vision_tower.weight", False),
        ("vision_tower", False),
        ("score.weight", False),
    ],
)
def test_what_is_ignored(name: str, ignored: bool) -> None:
    assert names_of("gemma3").is_ignored(name) is ignored
