"""Every form of a product with weights gives the product, at each number of rows that chooses a form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hkv_jax.model.matmul import CHUNKS, MAX_CHUNKED_ROWS, project, project_to_vocabulary

FORMS = [project, project_to_vocabulary]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("outputs", [4 * CHUNKS, 4 * CHUNKS + 3])
def test_it_is_the_product_in_float32(form, dtype, platform: str, outputs: int) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(outputs, 24)), dtype)
    for rows in (1, 2, MAX_CHUNKED_ROWS, MAX_CHUNKED_ROWS + 1):
        x = jnp.asarray(rng.normal(size=(rows, 24)), dtype)
        found = jax.jit(form, static_argnums=2)(x, weight, platform)
        assert found.dtype == jnp.float32
        expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        # Products of bfloat16 are exact in float32: only the sums round.
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_the_others(form) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(1)
    weight, x = (jnp.asarray(rng.normal(size=(rows, 24)), jnp.bfloat16) for rows in (64, 8))
    product = jax.jit(form, static_argnums=2)
    spoiled = x.at[3:].set(jnp.nan)
    np.testing.assert_array_equal(product(x, weight, "cpu")[:3], product(spoiled, weight, "cpu")[:3])
