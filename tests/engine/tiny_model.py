"""A checkpoint of two layers for tests of the whole engine, and an engine on it.

Owns: its shapes and file, and the limits that keep its programs few. Must never: run it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hkv_jax.config import EngineConfig
from hkv_jax.engine.factory import EngineParts, build_engine

VOCAB, HIDDEN = 128, 64


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A sliding layer and a global one, with soft caps, random weights, and logits far enough apart."""

    head_dim: int
    num_kv_heads: int
    window: int
    dtype: str

    def write(self, folder: Path) -> Path:
        heads = 2 * self.num_kv_heads
        config = {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 512,
            "query_pre_attn_scalar": self.head_dim,
            "sliding_window": self.window,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
            "torch_dtype": self.dtype,
        }
        (folder / "config.json").write_text(json.dumps(config))
        save_file(self._tensors(heads), folder / "model.safetensors")
        return folder

    def _tensors(self, heads: int) -> dict[str, np.ndarray]:
        query, key = heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
        for layer in range(2):
            of_layer = {
                "self_attn.q_proj": (query, HIDDEN),
                "self_attn.k_proj": (key, HIDDEN),
                "self_attn.v_proj": (key, HIDDEN),
                "self_attn.o_proj": (HIDDEN, query),
                "mlp.gate_proj": (HIDDEN, HIDDEN),
                "mlp.up_proj": (HIDDEN, HIDDEN),
                "mlp.down_proj": (HIDDEN, HIDDEN),
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
                "pre_feedforward_layernorm": (HIDDEN,),
                "post_feedforward_layernorm": (HIDDEN,),
            }
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
        rng = np.random.default_rng(self.head_dim + self.window)
        dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.float32
        tensors = {name: rng.standard_normal(shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
        # What is attended to must outweigh the last token, or every token would repeat it.
        tensors["model.embed_tokens.weight"] /= 8
        for layer in range(2):
            tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] += 3
        return {name: tensor.astype(dtype) for name, tensor in tensors.items()}


def tiny_engine(folder: Path, **options: object) -> EngineParts:
    """An engine on the model in ``folder``: 160 tokens a sequence, 16 a step, and ``options`` of ``EngineConfig``."""
    return build_engine(EngineConfig(model=folder, max_num_batched_tokens=16, max_model_len=160, **options))  # type: ignore[arg-type]
