"""The whole engine on the kernels, interpreted on a CPU: greedy tokens are those of the XLA backend."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hkv_jax.config import EngineConfig
from hkv_jax.engine.factory import build_engine
from hkv_jax.engine.request import Request
from hkv_jax.kvcache.format import PageLayout
from hkv_jax.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

VOCAB, HIDDEN, NUM_TOKENS = 128, 64, 4

PROMPT_LENGTHS = {
    "float32": (1, 150, 16, 31, 33, 48, 63, 65, 127),
    "bfloat16": (1, 150, 2, 15, 17, 32, 47, 49, 64, 128, 149),
}
"""Around the sizes of chunks, blocks and windows; between the two dtypes of a head dim, every one."""


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


def greedy_tokens(
    folder: Path, backend: str, lengths: tuple[int, ...], **options: object
) -> tuple[dict[str, list[int]], PageLayout]:
    """Tokens by request of prompts of these lengths, run together, and the layout of the pages."""
    config = EngineConfig(
        model=folder,
        attention_backend=backend,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        max_model_len=160,
        kv_cache_memory=32 * 2**20,
        **options,  # type: ignore[arg-type]
    )
    parts = build_engine(config)
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    tokens: dict[str, list[int]] = {}
    for length in lengths:
        tokens[str(length)] = []
        parts.engine.add(Request.create(str(length), rng.integers(3, VOCAB, length).tolist(), params))
    while parts.engine.has_work:
        for event in parts.engine.step():
            tokens[event.sequence.request.request_id].append(event.token_id)
    return tokens, parts.layout.groups[0].format.layout


@pytest.mark.parametrize(
    ("model", "devices"),
    [
        (TinyModel(64, 2, 64, "float32"), 1),
        (TinyModel(64, 1, 48, "bfloat16"), 1),
        (TinyModel(128, 2, 48, "float32"), 2),
        (TinyModel(128, 1, 16, "bfloat16"), 1),
        (TinyModel(256, 2, 48, "float32"), 1),
        (TinyModel(256, 1, 32, "bfloat16"), 1),
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_xla(
    model: TinyModel, devices: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model.write(tmp_path)
    lengths = PROMPT_LENGTHS[model.dtype]
    expected, _ = greedy_tokens(folder, "auto", lengths)
    assert {len(tokens) for tokens in expected.values()} == {NUM_TOKENS}
    distinct = {token for tokens in expected.values() for token in tokens}
    assert len(distinct) >= 10, "tokens that repeat would be the same whatever attention gives"
    with caplog.at_level(logging.WARNING):
        found, page_layout = greedy_tokens(folder, "pallas", lengths, tensor_parallel_size=devices)
    assert found == expected
    assert page_layout is PageLayout.PLANES
    assert "interpreted" in caplog.text
