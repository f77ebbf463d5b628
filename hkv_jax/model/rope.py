"""Rotary position embedding: angles of a step's positions and their application.

Frequencies follow Su et al. (arXiv 2104.09864), the linear scaling of Chen et al. (arXiv 2306.15595) and the
frequency-dependent scaling published with Llama 3.1. Must never: know a layer's kind; each layer names its
``RopeSpec``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from hkv_jax.spec import Llama3Scaling, RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> NDArray[np.float32]:
    """Radians a position turns each pair of dimensions by: f32[head_dim / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    if rope.llama3 is not None:
        frequencies = _llama3(frequencies, rope.llama3)
    return (frequencies / np.float32(rope.linear_factor)).astype(np.float32)


def rope_angles(rope: RopeSpec, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each position's angles, f32[T, head_dim / 2] each; positions i32[T]."""
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [T, heads, D]: dimension i pairs with i + D/2."""
    cosine, sine = (part[:, None, :].astype(x.dtype) for part in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _llama3(frequencies: NDArray[np.float32], scaling: Llama3Scaling) -> NDArray[np.float32]:
    wavelengths = 2 * np.pi / frequencies
    low_wavelength = scaling.original_max_position / scaling.low_freq_factor
    high_wavelength = scaling.original_max_position / scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = np.where(wavelengths > low_wavelength, frequencies / scaling.factor, blended)
    return np.where(wavelengths < high_wavelength, frequencies, scaled).astype(np.float32)
