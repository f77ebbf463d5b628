"""Products with weights in the checkpoint's [out, in] layout, in the form each platform runs fastest.

The forms and their figures for XLA's CPU backend are in docs/benchmarks.md. Results are accumulated in float32: a
bfloat16 result is 3 to 9 times slower on CPU. Must never: hold weights.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp

CHUNKS = 16
MAX_CHUNKED_ROWS = 32

CHUNKED_FORM_RUNS = jax.__version_info__ >= (0, 8, 1)
"""Earlier releases compile the chunked form of bfloat16 for CPU and then refuse to run it."""


def project(x: jax.Array, weight: jax.Array, platform: str) -> jax.Array:
    """x [T, in] by weight [out, in]: f32[T, out]; ``platform`` is where it will run, ``cpu`` for the forms above."""
    if not _few_rows_on_cpu(x, weight, platform):
        return jnp.einsum("tk,nk->tn", x, weight, preferred_element_type=jnp.float32)
    padded = _at_least_two_rows(x)
    if CHUNKED_FORM_RUNS and cpu_has_tiles() and weight.shape[0] % CHUNKS == 0:
        chunked = weight.reshape(CHUNKS, -1, weight.shape[1])
        product = jnp.einsum("tk,cnk->ctn", padded, chunked, preferred_element_type=jnp.float32)
        product = product.transpose(1, 0, 2).reshape(padded.shape[0], -1)
    else:
        product = jnp.einsum("tk,nk->tn", padded, weight, preferred_element_type=jnp.float32)
    return product[: x.shape[0]]


def project_to_vocabulary(x: jax.Array, embedding: jax.Array, platform: str) -> jax.Array:
    """x [S, E] by the embedding [V, E]: f32[S, V]. On CPU the large operand goes first."""
    if _few_rows_on_cpu(x, embedding, platform):
        product = jnp.einsum("vk,sk->vs", embedding, _at_least_two_rows(x), preferred_element_type=jnp.float32)
        return product.T[: x.shape[0]]
    return jnp.einsum("sk,vk->sv", x, embedding, preferred_element_type=jnp.float32)


@cache
def cpu_has_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 tiles (AMX): there the chunked form wins, elsewhere the plain one does."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _few_rows_on_cpu(x: jax.Array, weight: jax.Array, platform: str) -> bool:
    return platform == "cpu" and weight.dtype == jnp.bfloat16 and x.shape[0] <= MAX_CHUNKED_ROWS


def _at_least_two_rows(x: jax.Array) -> jax.Array:
    # XLA's CPU backend takes a matrix-vector path for one bfloat16 row, 5 to 6 times slower than two rows.
    return x if x.shape[0] > 1 else jnp.pad(x, ((0, 1), (0, 0)))
