"""Which tensor of a checkpoint holds which parameter.

Owns: the names of both sides, the prefixes that checkpoints of text and of multimodal models put before them, and which
tensors are no concern of the text model. Must never: know shapes or read weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from hkv_jax.spec import ModelSpec

# A text model's own, and the two spellings of a text model inside a multimodal one.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_HEADS = {"language_model.model.": "language_model.lm_head.weight"}
_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"

_PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# Images' towers, and frequencies that old checkpoints store although they follow from the config.
_IGNORED = re.compile(
    r"(model\.)?(vision_tower|multi_modal_projector)\..+|(.+\.)?rotary_emb\.inv_freq",
)


class TensorNames:
    """Names of a model's tensors in one checkpoint, by the parameter names of ``hkv_jax.model.layers``.

    Args:
        spec: decides which parameters there are.
        prefix: what stands before the names of the text model's tensors.
    """

    def __init__(self, spec: ModelSpec, prefix: str = _PREFIXES[0]) -> None:
        self._spec = spec
        self._prefix = prefix
        self._head = _HEADS.get(prefix, _HEAD)

    @classmethod
    def of_checkpoint(cls, spec: ModelSpec, stored: Collection[str]) -> TensorNames:
        """The names a checkpoint uses, known by its embedding; the plain ones if that is missing."""
        prefix = next((one for one in _PREFIXES if one + _EMBEDDING in stored), _PREFIXES[0])
        return cls(spec, prefix)

    def outside_layers(self) -> dict[str, str]:
        """Tensors that belong to no layer: ``embedding``, ``final_norm``, and ``lm_head`` unless it is tied."""
        names = {"embedding": self._prefix + _EMBEDDING, "final_norm": f"{self._prefix}norm.weight"}
        if not self._spec.tie_embeddings:
            names["lm_head"] = self._head
        return names

    def of_layer(self, index: int) -> dict[str, str]:
        """Tensors of layer ``index``, counted from 0."""
        spec = self._spec
        names = {name: f"{module}.weight" for name, module in _PROJECTIONS.items()}
        names["attention_norm"] = "input_layernorm.weight"
        names["mlp_norm"] = "post_attention_layernorm.weight"
        if spec.sandwich_norm:
            names["post_attention_norm"] = names["mlp_norm"]
            names["mlp_norm"] = "pre_feedforward_layernorm.weight"
            names["post_mlp_norm"] = "post_feedforward_layernorm.weight"
        if spec.qk_norm:
            names |= {"q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"}
        biased = [*("qkv" if spec.attention_bias else ""), *("o" if spec.output_bias else "")]
        biased += ["gate", "up", "down"] if spec.mlp_bias else []
        names |= {f"{name}_bias": f"{_PROJECTIONS[name]}.bias" for name in biased}
        return {name: f"{self._prefix}layers.{index}.{tensor}" for name, tensor in names.items()}

    @property
    def tied_head(self) -> str | None:
        """The tensor that may repeat the embedding where both are tied; ``None`` where they are not.

        A copy is ignored; a head that differs from the embedding would mean that the config is wrong.
        """
        return self._head if self._spec.tie_embeddings else None

    def is_ignored(self, name: str) -> bool:
        """Whether the text model has no use for a tensor of the checkpoint."""
        return name == self.tied_head or _IGNORED.fullmatch(name) is not None
