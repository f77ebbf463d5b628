"""One decoder layer and the embedder against numpy, and the names their parameters go by."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from hkv_jax.families.tensor_names import TensorNames
from hkv_jax.model.layers import DecoderLayer, Embedder, abstract_parameters, bind, rms_norm, soft_cap
from hkv_jax.model.rope import apply_rope, rope_angles
from hkv_jax.spec import Activation, ModelSpec, RopeSpec
from hkv_jax.testing.unbuilt_engine import hybrid_spec

TOKENS, DIM, KV_HEADS = 5, 8, 2

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gemma": {
        "activation": Activation.GELU_TANH,
        "unit_offset_norm": True,
        "sandwich_norm": True,
        "qk_norm": True,
        "embedding_scale": 32**0.5,
    },
    "biased": {"attention_bias": True, "output_bias": True, "mlp_bias": True, "tie_embeddings": False},
    "qk norm": {"qk_norm": True, "norm_eps": 1e-2, "final_soft_cap": 3.0},
}


@pytest.fixture(params=VARIANTS)
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return hybrid_spec(**VARIANTS[request.param])


def layer_of(spec: ModelSpec) -> Callable[[], DecoderLayer]:
    return partial(DecoderLayer, spec, spec.layers[0], KV_HEADS, "cpu")


def random_weights(shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(scale=0.3, size=shape).astype(dtype) for name, shape in sorted(shapes.items())}


def attend(queries: Any, keys: Any, values: Any) -> Any:
    """No attention, but something in which q, k and v of the right heads each have a part; numpy or jax."""
    group = queries.shape[1] // keys.shape[1]
    return queries * 0.5 + keys.repeat(group, axis=1) * values.repeat(group, axis=1)


class NumpyLayer:
    """The layer in float64, written from its description."""

    def __init__(self, spec: ModelSpec, weights: dict[str, NDArray]) -> None:
        self.spec, self.weights = spec, {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(self, x: NDArray, name: str) -> NDArray:
        scale = self.weights[name] + (1 if self.spec.unit_offset_norm else 0)
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.spec.norm_eps) * scale

    def linear(self, name: str, x: NDArray) -> NDArray:
        return x @ self.weights[name].T + self.weights.get(f"{name}_bias", 0)

    def activate(self, x: NDArray) -> NDArray:
        if self.spec.activation is Activation.SILU:
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def __call__(self, x: NDArray, angles: tuple[jax.Array, jax.Array]) -> NDArray:
        spec = self.spec
        normed = self.norm(x, "attention_norm")
        q, k, v = (self.linear(name, normed).reshape(TOKENS, -1, DIM) for name in "qkv")
        if spec.qk_norm:
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        q, k = (np.asarray(apply_rope(jnp.asarray(part, jnp.float32), angles), np.float64) for part in (q, k))
        branch = self.linear("o", attend(q, k, v).reshape(TOKENS, -1))
        x = x + (self.norm(branch, "post_attention_norm") if spec.sandwich_norm else branch)
        normed = self.norm(x, "mlp_norm")
        branch = self.linear("down", self.activate(self.linear("gate", normed)) * self.linear("up", normed))
        return x + (self.norm(branch, "post_mlp_norm") if spec.sandwich_norm else branch)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (ml_dtypes.bfloat16, 0.3)])
def test_a_layer_is_the_formula(spec: ModelSpec, dtype: Any, tolerance: float) -> None:
    weights = random_weights(abstract_parameters(layer_of(spec)), dtype)
    x = np.random.default_rng(1).normal(size=(TOKENS, spec.hidden_size)).astype(dtype)
    angles = rope_angles(RopeSpec(1e4), DIM, jnp.arange(TOKENS) + 7)
    found = jax.jit(lambda w, x: bind(layer_of(spec), w)(x, angles, attend))(weights, x)
    assert found.dtype == dtype
    expected = NumpyLayer(spec, weights)(x.astype(np.float64), angles)
    assert np.abs(expected - x.astype(np.float64)).max() > 1, "the layer must do something"
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance, rtol=tolerance / 10)


def test_the_embedder_is_the_formula(spec: ModelSpec) -> None:
    module = partial(Embedder, spec, "cpu")
    weights = random_weights(abstract_parameters(module))
    tokens, x = np.array([3, 0, 95], np.int32), np.random.default_rng(2).normal(size=(3, 32)).astype(np.float32)
    embedded = jax.jit(lambda w, tokens: bind(module, w).embed(tokens))(weights, tokens)
    logits = jax.jit(lambda w, x: bind(module, w).logits(x))(weights, x)
    np.testing.assert_allclose(embedded, weights["embedding"][tokens] * spec.embedding_scale, rtol=1e-6)
    head = weights["embedding" if spec.tie_embeddings else "lm_head"].astype(np.float64)
    expected = NumpyLayer(spec, weights).norm(x.astype(np.float64), "final_norm") @ head.T
    if spec.final_soft_cap is not None:
        expected = spec.final_soft_cap * np.tanh(expected / spec.final_soft_cap)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_logits_are_float32_whatever_the_weights_are() -> None:
    module = partial(Embedder, hybrid_spec(), "cpu")
    weights = random_weights(abstract_parameters(module), ml_dtypes.bfloat16)
    assert jax.jit(lambda w: bind(module, w).logits(jnp.ones((1, 32), jnp.bfloat16)))(weights).dtype == jnp.float32


def test_the_embedding_scale_is_rounded_before_it_is_used() -> None:
    # sqrt(640) = 25.298… is 25.25 in bfloat16; 1.25 times either rounds to different numbers.
    module = partial(Embedder, hybrid_spec(embedding_scale=640**0.5), "cpu")
    weights = random_weights(abstract_parameters(module), ml_dtypes.bfloat16)
    weights["embedding"][:] = 1.25
    embedded = np.asarray(jax.jit(lambda w: bind(module, w).embed(jnp.array([4])))(weights), np.float32)
    assert embedded[0, 0] == np.float32(ml_dtypes.bfloat16(25.25 * 1.25))
    assert embedded[0, 0] != np.float32(ml_dtypes.bfloat16(640**0.5 * 1.25))


@pytest.mark.parametrize(("unit_offset", "weight"), [(False, 1.0), (True, 3 / 1024)])
def test_norms_of_bfloat16_are_rounded_once(unit_offset: bool, weight: float) -> None:
    # 1 + 3/1024 is 1 in bfloat16, so the sum must not be rounded either.
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 512)) * 300, jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True)) * (weight + unit_offset)
    spec = hybrid_spec(unit_offset_norm=unit_offset)
    found = np.asarray(rms_norm(x, jnp.full(512, weight, jnp.bfloat16), spec), np.float64)
    assert np.abs(found / exact - 1).max() < 2**-8 + 1e-5


def test_soft_cap_bounds_and_leaves_small_numbers() -> None:
    x = jnp.array([-1e6, -1.0, 0.0, 1e-3, 1e6])
    np.testing.assert_allclose(soft_cap(x, 2.0), 2 * np.tanh(np.asarray(x) / 2), rtol=1e-6)
    assert soft_cap(x, None) is x


def test_parameters_go_by_the_names_of_the_checkpoint_map(spec: ModelSpec) -> None:
    names = TensorNames(spec)
    assert set(abstract_parameters(layer_of(spec))) == set(names.of_layer(0))
    assert set(abstract_parameters(partial(Embedder, spec, "cpu"))) == set(names.outside_layers())


def test_shapes_follow_the_heads_after_replication() -> None:
    spec = hybrid_spec(attention_bias=True, qk_norm=True)
    shapes = abstract_parameters(partial(DecoderLayer, spec, spec.layers[0], 4, "cpu"))
    assert shapes["q"] == shapes["k"] == shapes["v"] == (4 * DIM, 32)
    assert shapes["o"] == (32, 4 * DIM)
    assert shapes["k_bias"] == (4 * DIM,)
    assert shapes["q_norm"] == (DIM,)
    assert shapes["gate"] == (64, 32)
    assert shapes["down"] == (32, 64)


def test_a_missing_or_unknown_parameter_is_not_bound_silently() -> None:
    spec = hybrid_spec()
    weights = random_weights(abstract_parameters(layer_of(spec)))
    with pytest.raises((KeyError, ValueError)):
        bind(layer_of(spec), weights | {"unknown": weights["q"]})
    del weights["q"]
    module = bind(layer_of(spec), weights)
    with pytest.raises(TypeError):
        module(jnp.zeros((1, 32)), rope_angles(RopeSpec(1e4), DIM, jnp.arange(1)), attend)
