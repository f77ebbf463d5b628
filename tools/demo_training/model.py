"""The demo model as one dense function of whole sequences: what is trained, and what the paged engine must equal.

Owns: shapes, parameters, the forward pass in the Gemma-3 form (QK norm, four norms a layer, GeGLU, tied embedding, two
RoPEs), and the model folder. A sliding layer attends by blocks of the window (its own block and the one before it), a
global layer by blocks of queries against the keys up to them; never all against all. Must never: use the engine's own
code, or the comparison with it would prove nothing.

Parameters are one flat dict. Weights of a layer are stacked over the layers, ``[layers, in, out]``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tools.demo_training import tokenizer, vocabulary
from tools.demo_training.softmax_attention import attend

Parameters = dict[str, jax.Array]

QUERY_BLOCK = 256
"""Queries of a global layer that are attended at once; bounds the scores in memory to heads × 256 × T."""
MAX_NEW_TOKENS = 64
_EPS = 1e-6
_INITIAL_SCALE, _INITIAL_SHARPNESS, _INITIAL_BRANCH = 0.2, 0.3, 0.3


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model, and what each layer attends to.

    ``windows`` has one entry a layer, ``None`` for a global one; mutations put other windows in. ``local_theta``
    belongs to sliding layers, ``theta`` and ``factor`` (which slows the angles) to global ones, whatever their window.
    """

    vocab_size: int
    hidden: int = 128
    intermediate: int = 128
    num_heads: int = 4
    head_dim: int = 64
    windows: tuple[int | None, ...] = (*(32,) * 5, None, *(32,) * 5, None)
    globals_at: tuple[int, ...] = (5, 11)
    theta: float = 1_000_000.0
    factor: float = 10_000.0
    local_theta: float = 10_000.0

    @property
    def num_layers(self) -> int:
        """Layers of both kinds."""
        return len(self.windows)


def default_shape() -> Shape:
    """The demo model's: its vocabulary is the tokenizer's, filled up to a multiple of 64."""
    return Shape(-(-len(tokenizer.token_names()) // 64) * 64)


def initial_parameters(shape: Shape, seed: int) -> Parameters:
    """Random weights, norms at one (0: Gemma stores the offset from one), those of queries and keys a little above.

    Norms behind every matrix make its size irrelevant, but for how far a step of the optimiser turns it: small ones
    learn faster. Attention must become sharp to find one token among thousands; starting sharper saves a part of the
    way.
    """
    rng = np.random.default_rng(seed)
    layers, hidden, wide = shape.num_layers, shape.hidden, shape.intermediate
    queries = shape.num_heads * shape.head_dim
    sizes = {
        "q": (hidden, queries),
        "k": (hidden, shape.head_dim),
        "v": (hidden, shape.head_dim),
        "o": (queries, hidden),
        "gate": (hidden, wide),
        "up": (hidden, wide),
        "down": (wide, hidden),
    }
    parameters = {
        name: rng.standard_normal((layers, *size), np.float32) * np.float32(_INITIAL_SCALE / np.sqrt(size[0]))
        for name, size in sizes.items()
    }
    norms = ("attention_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")
    parameters |= {name: np.zeros((layers, hidden), np.float32) for name in norms}
    for name in ("post_attention_norm", "post_mlp_norm"):
        parameters[name] += np.float32(_INITIAL_BRANCH - 1)
    parameters |= {
        name: np.full((layers, shape.head_dim), _INITIAL_SHARPNESS, np.float32) for name in ("q_norm", "k_norm")
    }
    parameters["final_norm"] = np.zeros(hidden, np.float32)
    embedding = rng.standard_normal((shape.vocab_size, hidden), np.float32) / np.float32(np.sqrt(hidden))
    for bare, spaced in tokenizer.twins():
        embedding[bare] = embedding[spaced]
    parameters["embedding"] = embedding
    return {name: jnp.asarray(array) for name, array in parameters.items()}


def forward(
    shape: Shape, parameters: Parameters, tokens: jax.Array, global_gates: jax.Array | None = None
) -> jax.Array:
    """Logits of every position: i32[B, T] → f32[B, T, V]. T is a multiple of every window.

    ``global_gates`` f32[global layers, B, T] multiply what the attention of each global layer adds at each position;
    training leaves one out now and then.
    """
    batch, length = tokens.shape
    # A product with one-hot rows, no lookup: its gradient is a product too, where a lookup's is a slow scatter.
    x = jax.nn.one_hot(tokens, shape.vocab_size) @ (parameters["embedding"] * jnp.sqrt(jnp.float32(shape.hidden)))
    layers = {name: jnp.unstack(parameters[name]) for name in _FOLDER_NAMES}
    for layer, window in enumerate(shape.windows):
        weights = {name: arrays[layer] for name, arrays in layers.items()}
        is_global = layer in shape.globals_at
        angles = _angles(shape, length, is_global=is_global)
        normed = rms_norm(x, weights["attention_norm"])
        queries = rms_norm((normed @ weights["q"]).reshape(batch, length, shape.num_heads, -1), weights["q_norm"])
        keys = rms_norm(normed @ weights["k"], weights["k_norm"])[:, :, None]
        queries = _rotate(queries, angles) * jnp.float32(shape.head_dim**-0.5)
        keys, values = _rotate(keys, angles)[:, :, 0], normed @ weights["v"]
        attended = (
            attend_globally(queries, keys, values) if window is None else attend_near(queries, keys, values, window)
        )
        branch = attended.reshape(batch, length, -1) @ weights["o"]
        branch = rms_norm(branch, weights["post_attention_norm"])
        if is_global and global_gates is not None:
            branch = branch * global_gates[shape.globals_at.index(layer), :, :, None]
        x = x + branch
        normed = rms_norm(x, weights["mlp_norm"])
        branch = (jax.nn.gelu(normed @ weights["gate"], approximate=True) * (normed @ weights["up"])) @ weights["down"]
        x = x + rms_norm(branch, weights["post_mlp_norm"])
    return rms_norm(x, parameters["final_norm"]) @ parameters["embedding"].T


def copy_global_attention(shape: Shape, parameters: Parameters) -> Parameters:
    """The parameters with the attention of the first global layer in the place of the last one's, too."""
    first, last = shape.globals_at[0], shape.globals_at[-1]
    copied = {name: parameters[name].at[last].set(parameters[name][first]) for name in _ATTENTION}
    return {**parameters, **copied}


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """RMSNorm over the last axis; the weight is the offset from one."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _EPS) * (1.0 + weight)


def attend_near(queries: jax.Array, keys: jax.Array, values: jax.Array, window: int) -> jax.Array:
    """Sliding attention: a token sees itself and window - 1 before it.

    q [B, T, H, D], k and v [B, T, D] → [B, T, H, D].
    """
    batch, length, heads, dim = queries.shape
    block = _block_of(window)
    count = length // block
    blocked = queries.reshape(batch * count, block * heads, dim)
    near_keys, near_values = (_with_previous(x.reshape(batch, count, block, dim)) for x in (keys, values))
    back = np.arange(block)[:, None] + block - np.arange(2 * block)[None, :]
    seen = np.broadcast_to((back >= 0) & (back < window), (batch, count, block, 2 * block)).copy()
    seen[:, 0, :, :block] = False
    seen = np.repeat(seen.reshape(batch * count, block, 2 * block), heads, axis=1)
    return attend(blocked, near_keys, near_values, jnp.asarray(seen)).reshape(batch, length, heads, dim)


def attend_globally(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Causal attention to everything, in blocks of queries; shapes as in ``attend_near``."""
    batch, length, heads, dim = queries.shape
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        part = queries[:, start:stop].reshape(batch, -1, dim)
        seen = np.repeat(np.arange(start, stop), heads)[:, None] >= np.arange(stop)[None, :]
        outputs.append(attend(part, keys[:, :stop], values[:, :stop], jnp.asarray(seen)))
    return jnp.concatenate(outputs, axis=1).reshape(batch, length, heads, dim)


def _block_of(window: int) -> int:
    """The power of two that holds the window, 32 at least: lengths are multiples of it."""
    return max(32, 1 << (window - 1).bit_length())


def _with_previous(blocks: jax.Array) -> jax.Array:
    """[B, N, block, D] → [B · N, 2 block, D]: each block behind the one before it (the first behind zeros)."""
    previous = jnp.pad(blocks, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
    return jnp.concatenate([previous, blocks], axis=2).reshape(-1, 2 * blocks.shape[2], blocks.shape[3])


def _angles(shape: Shape, length: int, *, is_global: bool) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [T, D / 2], computed in f32 as the configuration says."""
    theta, factor = (shape.theta, shape.factor) if is_global else (shape.local_theta, 1.0)
    exponents = np.arange(0, shape.head_dim, 2, dtype=np.float32) / np.float32(shape.head_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(theta), exponents) / np.float32(factor)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))


def _rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [B, T, H, D]: dimension i pairs with i + D / 2."""
    cosine, sine = (part[None, :, None, :] for part in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


_ATTENTION = ("q", "k", "v", "o", "q_norm", "k_norm", "attention_norm", "post_attention_norm")
_FOLDER_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def configuration(shape: Shape) -> dict[str, Any]:
    """The ``config.json`` of ``gemma3_text``."""
    special = vocabulary.SPECIAL_TOKENS
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": 1,
        "head_dim": shape.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": _EPS,
        "query_pre_attn_scalar": shape.head_dim,
        "sliding_window": next(window for window in shape.windows if window is not None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in shape.windows],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": shape.factor, "rope_theta": shape.theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": shape.local_theta},
        },
        "max_position_embeddings": tokenizer.MAX_POSITION,
        "tie_word_embeddings": True,
        "bos_token_id": special.index(vocabulary.BOS),
        "eos_token_id": [special.index(vocabulary.EOS), special.index(vocabulary.END)],
    }


def save(folder: Path, shape: Shape, parameters: Mapping[str, Any]) -> None:
    """Write the model folder: config, generation config, bf16 weights under their Hugging Face names, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(shape)
    _write_json(folder / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    pad = vocabulary.SPECIAL_TOKENS.index(vocabulary.PAD)
    # On text that it does not understand it may repeat itself without end; no answer it was trained on is as long.
    limits = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
    _write_json(folder / "generation_config.json", {**ids, "pad_token_id": pad, **limits})
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "model.embed_tokens.weight": np.asarray(parameters["embedding"]),
        "model.norm.weight": np.asarray(parameters["final_norm"]),
    }
    for name, theirs in _FOLDER_NAMES.items():
        for layer, array in enumerate(np.asarray(parameters[name])):
            tensors[f"model.layers.{layer}.{theirs}.weight"] = np.ascontiguousarray(array.T)
    path = folder / "model.safetensors"
    save_file(
        {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}, path, metadata={"format": "pt"}
    )
    path.chmod(0o644)
    tokenizer.save(folder)


def load(folder: Path) -> tuple[Shape, Parameters]:
    """The shape and the weights, in f32, of a folder that ``save`` wrote."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds, full = config["layer_types"], config["rope_parameters"]["full_attention"]
    shape = Shape(
        vocab_size=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        windows=tuple(None if kind == "full_attention" else config["sliding_window"] for kind in kinds),
        globals_at=tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention"),
        theta=full["rope_theta"],
        factor=full["factor"],
        local_theta=config["rope_parameters"]["sliding_attention"]["rope_theta"],
    )
    tensors = {name: array.astype(np.float32) for name, array in load_file(folder / "model.safetensors").items()}
    parameters = {"embedding": tensors["model.embed_tokens.weight"], "final_norm": tensors["model.norm.weight"]}
    for name, theirs in _FOLDER_NAMES.items():
        layers = [tensors[f"model.layers.{layer}.{theirs}.weight"].T for layer in range(shape.num_layers)]
        parameters[name] = np.stack(layers)
    return shape, {name: jnp.asarray(array) for name, array in parameters.items()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
