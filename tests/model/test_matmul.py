"""Every form of a product with weights gives the product, at each number of rows that chooses a form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hkv_jax.model import matmul
from hkv_jax.model.matmul import CHUNKS, MAX_CHUNKED_ROWS, project, project_to_vocabulary

Form = Callable[[jax.Array, jax.Array, str], jax.Array]
FORMS: list[Form] = [project, project_to_vocabulary]


@pytest.fixture(autouse=True, params=[True, False], ids=["tiles", "no tiles"])
def _cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form depends on the CPU; both must be right on this one."""
    monkeypatch.setattr(matmul, "cpu_has_tiles", lambda: request.param)


def compiled(form: Form, platform: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    # A new function each time: jax would take the trace that an earlier test left.
    return jax.jit(lambda x, weight: form(x, weight, platform))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("outputs", [4 * CHUNKS, 4 * CHUNKS + 3])
def test_it_is_the_product_in_float32(form: Form, dtype: Any, platform: str, outputs: int) -> None:
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(outputs, 24)), dtype)
    for rows in (1, 2, MAX_CHUNKED_ROWS, MAX_CHUNKED_ROWS + 1):
        x = jnp.asarray(rng.normal(size=(rows, 24)), dtype)
        found = compiled(form, platform)(x, weight)
        assert found.dtype == jnp.float32
        expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        # Products of bfloat16 are exact in float32: only the sums round.
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_the_others(form: Form) -> None:
    rng = np.random.default_rng(1)
    weight, x = (jnp.asarray(rng.normal(size=(rows, 24)), jnp.bfloat16) for rows in (64, 8))
    product = compiled(form, "cpu")
    spoiled = x.at[3:].set(jnp.nan)
    np.testing.assert_array_equal(product(x, weight)[:3], product(spoiled, weight)[:3])
