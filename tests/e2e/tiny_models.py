"""Random Gemma 3 checkpoints of any depth and windows, for comparisons in float32.

Owns: their shapes and files, and the options to probe them with. Must never: run them.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from hkv_jax.families import TensorNames, read_model_spec
from hkv_jax.kvcache.receptive import receptive_tokens
from hkv_jax.model import attention
from hkv_jax.spec import LayerKind, LayerSpec
from hkv_jax.testing.probe import ProbeOptions

VOCABULARY, HIDDEN, HEADS, HEAD_DIM = 96, 32, 2, 16
WEIGHTS_STD = 0.3

BRANCH_SCALE = {3: 1.0, 6: 1.0, 20: 0.3}
"""Factor on what a layer adds to its input, by number of sliding layers: large, so that errors of a few show; small,
so that many do not amplify rounding."""

STEP_TOKENS = 64

LAYERS = {3: "ssgsg", 6: "sssgsssg", 20: 4 * "sssssg"}
"""Kinds of the layers, bottom first, by how many of them slide."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Sliding layers have the ``windows`` in turn."""

    num_sliding: int
    windows: tuple[int, ...]
    sinks: bool = False

    @property
    def block_size(self) -> int:
        """Of global groups, tokens; half as many in sliding ones."""
        return 8 if max(self.windows) > 8 else 4

    @property
    def sliding_block_size(self) -> int:
        return self.block_size // (2 if self.num_sliding == 6 else 1)

    def __str__(self) -> str:
        return f"S{self.num_sliding}-W{'+'.join(map(str, self.windows))}{'-sinks' if self.sinks else ''}"


def write_checkpoint(folder: Path, num_sliding: int) -> Path:
    """A random ``gemma3_text`` checkpoint."""
    kinds = LAYERS[num_sliding]
    folder.mkdir()
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": 16,
        "layer_types": ["sliding_attention" if kind == "s" else "full_attention" for kind in kinds],
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": [1],
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = TensorNames(read_model_spec(folder))
    width = HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "q": (width, HIDDEN),
        "k": (HEAD_DIM, HIDDEN),
        "v": (HEAD_DIM, HIDDEN),
        "o": (HIDDEN, width),
        "gate": (HIDDEN, HIDDEN),
        "up": (HIDDEN, HIDDEN),
        "down": (HIDDEN, HIDDEN),
        "q_norm": (HEAD_DIM,),
        "k_norm": (HEAD_DIM,),
        "embedding": (VOCABULARY, HIDDEN),
    }
    rng = np.random.default_rng(len(kinds))
    tensors = {}
    for owner in (names.outside_layers(), *(names.of_layer(layer) for layer in range(len(kinds)))):
        for parameter, tensor in owner.items():
            shape = shapes.get(parameter, (HIDDEN,))
            # The weight of a norm is added to 1.
            mean = BRANCH_SCALE[num_sliding] - 1 if parameter.startswith("post_") else 0.0
            tensors[tensor] = rng.normal(mean, WEIGHTS_STD, shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def windowed(layers: tuple[LayerSpec, ...], windows: tuple[int, ...]) -> tuple[LayerSpec, ...]:
    """The layers, of which the sliding ones have these windows in turn."""
    changed, seen = [], 0
    for layer in layers:
        if layer.kind is LayerKind.SLIDING:
            layer = dataclasses.replace(layer, window=windows[seen % len(windows)])
            seen += 1
        changed.append(layer)
    return tuple(changed)


def options_for(model: Model, folders: dict[int, Path]) -> ProbeOptions:
    folder = folders[model.num_sliding]
    layers = windowed(read_model_spec(folder).layers, model.windows)
    return ProbeOptions(
        folder,
        block_size=model.block_size,
        sliding_block_size=model.sliding_block_size,
        max_num_seqs=2,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=512,
        spec_changes=(("layers", layers),),
    )


def write_and_attend_with_sinks(mesh: Any, step: Any, layer: attention.LayerArrays, *rest: Any) -> Any:
    """As ``write_and_attend``, with a sink for each head of every layer."""
    sinks = jnp.linspace(-1.0, 2.0, layer.queries.shape[1])
    return attention.write_and_attend(mesh, step, dataclasses.replace(layer, sinks=sinks), *rest)


def receptive(options: ProbeOptions) -> int:
    """R in tokens."""
    spec = dataclasses.replace(read_model_spec(options.folder), **dict(options.spec_changes))
    groups = spec.kv_groups()
    sliding = options.sliding_block_size or options.block_size
    tokens = receptive_tokens(groups, [options.block_size if group.window is None else sliding for group in groups])
    assert tokens is not None
    return tokens


@cache
def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()
    return ids
