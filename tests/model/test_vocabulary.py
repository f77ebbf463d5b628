"""Reductions over the vocabulary against numpy, at sizes that divide badly into blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from hkv_jax.model import vocabulary

SIZES = (1, 2, 7, 97, 300, 1009, 5000)
ROWS = 4

argmax = jax.jit(vocabulary.argmax)
top_k = jax.jit(vocabulary.top_k, static_argnums=1)
log_sum_exp = jax.jit(vocabulary.log_sum_exp)
invert_cumulative = jax.jit(vocabulary.invert_cumulative)


def random_values(size: int, distinct: int | None = None) -> NDArray[np.float32]:
    """f32[ROWS, size]; with ``distinct``, many are equal."""
    rng = np.random.default_rng(size)
    if distinct is None:
        return rng.normal(scale=4, size=(ROWS, size)).astype(np.float32)
    return rng.integers(0, distinct, size=(ROWS, size)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("distinct", [None, 3, 1])
def test_argmax_of_equal_values_is_the_lowest_id(size: int, distinct: int | None) -> None:
    values = random_values(size, distinct)
    np.testing.assert_array_equal(argmax(values), values.argmax(axis=1))


def test_argmax_finds_a_value_in_the_last_short_block_and_among_negative_ones() -> None:
    values = np.full((3, 1009), -7.0, np.float32)
    values[0, 1008], values[1, 0], values[2, [500, 1008]] = -6.0, -6.5, -1.0
    np.testing.assert_array_equal(argmax(values), [1008, 0, 500])
    np.testing.assert_array_equal(argmax(np.full((1, 300), -np.inf, np.float32)), [0])


def expected_top(values: NDArray[np.float32], k: int) -> tuple[NDArray, NDArray]:
    """By a stable sort: of equal values the lowest id first."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, max(0, k - values.shape[1])))
    best = np.pad(np.take_along_axis(values, order, axis=1), missing, constant_values=-np.inf)
    return best, np.pad(order, missing)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("distinct", [None, 100, 3, 1])
@pytest.mark.parametrize("k", [1, 20, 64])
def test_top_k_is_a_stable_sort(size: int, distinct: int | None, k: int) -> None:
    values = random_values(size, distinct)
    best, ids = top_k(values, k)
    expected, expected_ids = expected_top(values, k)
    np.testing.assert_array_equal(best, expected)
    np.testing.assert_array_equal(ids, expected_ids)


@pytest.mark.parametrize("size", [80, 300, 5000])
def test_top_k_with_values_that_were_dropped(size: int) -> None:
    values = random_values(size)
    values[:, 5:] = np.where(np.arange(5, size) % 50 == 7, values[:, 5:], -np.inf)
    best, ids = top_k(values, 20)
    expected, expected_ids = expected_top(values, 20)
    finite = np.isfinite(expected)
    assert (finite.sum(axis=1) < 20).any() or size == 5000
    np.testing.assert_array_equal(best, expected)
    np.testing.assert_array_equal(np.asarray(ids)[finite], expected_ids[finite])


@pytest.mark.parametrize("size", [300, 5000])
def test_zeros_of_both_signs_are_equal(size: int) -> None:
    values = np.zeros((ROWS, size), np.float32)
    values[:, ::3] = -0.0
    np.testing.assert_array_equal(argmax(values), np.zeros(ROWS))
    np.testing.assert_array_equal(top_k(values, 20)[1], np.tile(np.arange(20), (ROWS, 1)))


@pytest.mark.parametrize("size", SIZES)
def test_log_sum_exp(size: int) -> None:
    values = random_values(size)
    values[0], values[1] = values[0] + 1000, values[1] - 1000  # beyond what exp can hold
    if size > 2:
        values[2, 1:-1] = -np.inf
    wide = values.astype(np.float64)
    largest = wide.max(axis=1, keepdims=True)
    expected = largest[:, 0] + np.log(np.exp(wide - largest).sum(axis=1))
    np.testing.assert_allclose(log_sum_exp(values), expected, rtol=1e-6, atol=1e-6)


def sparse_weights(size: int) -> NDArray[np.float32]:
    """f32[ROWS, size] of small integers, so that float32 sums are exact; most are 0, and so are both ends."""
    rng = np.random.default_rng(size)
    weights = rng.integers(0, 9, size=(ROWS, size)) * (rng.random((ROWS, size)) < 0.3)
    weights[:, 0] = weights[:, -1] = 0
    weights[:, size // 2] = 1
    return weights.astype(np.float32)


@pytest.mark.parametrize("size", [3, 7, 97, 300, 1009, 5000])
def test_the_cumulative_sum_is_inverted(size: int) -> None:
    weights = sparse_weights(size)
    running = weights.cumsum(axis=1, dtype=np.float64)
    # Multiples of 1/4096 of a total that float32 holds: targets fall on the boundaries too.
    for fraction in (0.0, 0.25, 0.5, 0.75, 4095 / 4096):
        expected = [np.searchsorted(r, np.float32(fraction) * r[-1], side="right") for r in running]
        found = np.asarray(invert_cumulative(weights, np.full(ROWS, fraction, np.float32)))
        np.testing.assert_array_equal(found, expected)
        assert (np.take_along_axis(weights, found[:, None], axis=1) > 0).all()


@pytest.mark.parametrize("size", [97, 5000])
def test_a_weight_of_zero_is_never_drawn_however_sums_round(size: int) -> None:
    rng = np.random.default_rng(0)
    below_one = np.nextafter(np.float32(1), np.float32(0))
    for _ in range(20):
        weights = np.exp(rng.normal(scale=8, size=(ROWS, size))).astype(np.float32)
        weights *= rng.random((ROWS, size)) < 0.1
        weights[:, 3] = 1e-30
        fractions = np.array([0, below_one, 1e-7, 0.9999999], np.float32)
        found = np.asarray(invert_cumulative(weights, fractions))
        assert (np.take_along_axis(weights, found[:, None], axis=1) > 0).all()


def test_a_single_positive_weight_is_always_drawn() -> None:
    for place in (0, 6, 299):
        weights = np.zeros((ROWS, 300), np.float32)
        weights[:, place] = 1e-20
        fractions = np.array([0, 0.1, 0.5, np.nextafter(np.float32(1), np.float32(0))], np.float32)
        np.testing.assert_array_equal(invert_cumulative(weights, fractions), [place] * ROWS)


@pytest.mark.parametrize("size", [1, 300, 262_144 // 64, 1009])
def test_blocks_hold_every_value_in_order(size: int) -> None:
    values = random_values(size)
    blocked = np.asarray(vocabulary.in_blocks(jnp.asarray(values), 16, fill=-1.0)).reshape(ROWS, -1)
    np.testing.assert_array_equal(blocked[:, :size], values)
    assert (blocked[:, size:] == -1).all()
