"""Rotary embeddings against complex numbers and the published formulas, one frequency at a time."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from hkv_jax.model.rope import apply_rope, inverse_frequencies, rope_angles
from hkv_jax.spec import Llama3Scaling, RopeSpec

LLAMA_31 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)


def llama3_frequency(frequency: float, scaling: Llama3Scaling) -> float:
    """As in the model card: long waves are stretched, short ones kept, those between are blended."""
    wavelength = 2 * math.pi / frequency
    turns = scaling.original_max_position / wavelength
    if turns > scaling.high_freq_factor:
        return frequency
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return share * frequency + (1 - share) * frequency / scaling.factor


@pytest.mark.parametrize("dim", [16, 128, 256])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_frequencies_fall_geometrically(theta: float, dim: int) -> None:
    expected = [theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    np.testing.assert_allclose(inverse_frequencies(RopeSpec(theta), dim), expected, rtol=1e-6)


def test_linear_scaling_divides_positions() -> None:
    plain, scaled = (inverse_frequencies(RopeSpec(1e6, linear_factor=f), 64) for f in (1.0, 8.0))
    np.testing.assert_allclose(scaled, plain / 8)


@pytest.mark.parametrize("scaling", [LLAMA_31, Llama3Scaling(32.0, 1.0, 4.0, 4096), Llama3Scaling(4.0, 2.0, 3.0, 512)])
def test_llama3_scaling(scaling: Llama3Scaling) -> None:
    dim, theta = 128, 5e5
    found = inverse_frequencies(RopeSpec(theta, llama3=scaling), dim)
    plain = [theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    np.testing.assert_allclose(found, [llama3_frequency(each, scaling) for each in plain], rtol=1e-5)
    factors = np.array(plain) / found
    kinds = (np.isclose(factors, 1), np.isclose(factors, scaling.factor))
    assert kinds[0].any() and kinds[1].any() and not (kinds[0] | kinds[1]).all(), "all three bands must be tried"


def test_rotation_is_a_product_of_complex_numbers() -> None:
    rng = np.random.default_rng(0)
    positions, dim, rope = np.array([0, 1, 17, 4095], np.int32), 16, RopeSpec(1e4, linear_factor=2.0)
    x = rng.normal(size=(4, 3, dim))
    found = apply_rope(jnp.asarray(x, jnp.float32), rope_angles(rope, dim, jnp.asarray(positions)))
    frequencies = 1e4 ** (-np.arange(0, dim, 2) / dim) / 2
    turned = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * np.exp(1j * positions[:, None, None] * frequencies)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    # float32 positions times float32 frequencies: an angle of 2048 is good to 1e-4.
    np.testing.assert_allclose(found, expected, atol=5e-4)
    np.testing.assert_array_equal(found[0], x[0].astype(np.float32))


def test_scores_depend_on_the_distance_alone() -> None:
    rng = np.random.default_rng(1)
    query, key = rng.normal(size=(2, 1, 1, 32)).astype(np.float32)
    scores = []
    for start in (0, 5, 300):
        angles = [rope_angles(RopeSpec(1e4), 32, jnp.array([start + extra])) for extra in (9, 0)]
        turned = [np.asarray(apply_rope(jnp.asarray(x), a)) for x, a in zip((query, key), angles, strict=True)]
        scores.append(float((turned[0] * turned[1]).sum()))
    np.testing.assert_allclose(scores, scores[0], atol=1e-4)


def test_the_dtype_is_kept() -> None:
    x = jnp.ones((2, 1, 8), jnp.bfloat16)
    assert apply_rope(x, rope_angles(RopeSpec(1e4), 8, jnp.arange(2))).dtype == jnp.bfloat16
