"""Rows shared out over chips: what one chip would find, whatever their number, and each chip works on its share."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hkv_jax.model.logprobs import top_logprobs
from hkv_jax.model.rows_over_chips import by_rows, over_vocabulary
from hkv_jax.sharding import OVER_VOCABULARY, REPLICATED, make_mesh, named, vocabulary_partition

VOCABULARY = 1000


@pytest.mark.parametrize("num_rows", [1, 3, 4, 9])
@pytest.mark.parametrize("chips", [1, 4])
def test_rows_are_those_of_one_chip(num_rows: int, chips: int) -> None:
    mesh = make_mesh(chips)
    rng = np.random.default_rng(num_rows)
    logits = rng.normal(size=(num_rows, VOCABULARY)).astype(np.float32)
    chosen = rng.integers(0, VOCABULARY, num_rows).astype(np.int32)
    expected = jax.jit(top_logprobs)(logits, chosen)
    split = jax.device_put(logits, named(mesh, OVER_VOCABULARY))
    found = jax.jit(partial(by_rows, mesh, top_logprobs))(split, chosen)
    np.testing.assert_array_equal(found.ids, expected.ids)
    for ours, theirs in zip(found, expected, strict=True):
        # A sum over a row is cut into vectors by how many rows there are.
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        assert ours.sharding.is_fully_replicated


def test_each_chip_works_on_its_share() -> None:
    shapes = []

    def note(logits: jax.Array) -> jax.Array:
        shapes.append(logits.shape)
        return jnp.max(logits, axis=1)

    by_rows(make_mesh(4), note, jnp.zeros((6, VOCABULARY)))
    assert shapes == [(2, VOCABULARY)]


@pytest.mark.parametrize(("size", "expected"), [(VOCABULARY, OVER_VOCABULARY), (VOCABULARY + 1, REPLICATED)])
def test_a_vocabulary_is_split_where_it_can_be(size: int, expected: jax.sharding.PartitionSpec) -> None:
    mesh = make_mesh(4)
    assert vocabulary_partition(size, mesh) == expected
    logits = jax.jit(partial(over_vocabulary, mesh=mesh))(jnp.zeros((2, size)))
    assert logits.sharding.is_equivalent_to(named(mesh, expected), 2)
