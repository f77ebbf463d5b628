"""The reference is itself held to cases that can be worked out by hand, and to a dense formula."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hkv_jax.testing.reference_attention import ReferenceAttention

N, H, K, D = 11, 4, 2, 6


@pytest.fixture
def arrays() -> tuple[NDArray, NDArray, NDArray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, H, D)), rng.normal(size=(N, K, D)), rng.normal(size=(N, K, D))


def test_a_window_of_one_token_returns_the_values_of_the_head_group(arrays: tuple[NDArray, NDArray, NDArray]) -> None:
    result = ReferenceAttention(1, 1.0)(*arrays)
    np.testing.assert_allclose(result, np.repeat(arrays[2], H // K, axis=1))


@pytest.mark.parametrize("window", [None, 2, 3, N, N + 5])
def test_equal_scores_give_the_mean_of_what_is_seen(
    window: int | None, arrays: tuple[NDArray, NDArray, NDArray]
) -> None:
    queries, keys, values = arrays
    result = ReferenceAttention(window, 1.0)(np.zeros_like(queries), keys, values)
    for position in range(N):
        first = max(0, position - (window or N) + 1)
        np.testing.assert_allclose(result[position, 0], values[first : position + 1, 0].mean(axis=0))


def test_a_sink_takes_its_share_and_gives_nothing(arrays: tuple[NDArray, NDArray, NDArray]) -> None:
    queries, keys, values = arrays
    sinks = np.log([1.0, 2.0, 3.0, 4.0])
    result = ReferenceAttention(3, 1.0, sinks=sinks)(np.zeros_like(queries), keys, values)
    for head, weight in enumerate((1, 2, 3, 4)):
        np.testing.assert_allclose(result[5, head], values[3:6, head // 2].sum(axis=0) / (3 + weight))


def test_large_scores_saturate_at_the_cap() -> None:
    # Scores ±1000 become ±2: weights e², e⁻².
    queries, keys, values = np.full((2, 1, 1), 1000.0), np.array([[[-1.0]], [[1.0]]]), np.array([[[10.0]], [[20.0]]])
    result = ReferenceAttention(None, 1.0, soft_cap=2.0)(queries, keys, values)
    expected = (10 * np.exp(-2) + 20 * np.exp(2)) / (np.exp(-2) + np.exp(2))
    np.testing.assert_allclose(result[1, 0, 0], expected)


@pytest.mark.parametrize(("window", "cap", "sinks"), [(None, None, False), (4, 1.5, False), (7, None, True)])
def test_it_agrees_with_a_dense_formula(
    window: int | None, cap: float | None, sinks: bool, arrays: tuple[NDArray, NDArray, NDArray]
) -> None:
    queries, keys, values = arrays
    sink = np.linspace(-1, 2, H) if sinks else None
    of_head = np.arange(H) // (H // K)
    scores = 0.7 * np.einsum("ihd,jhd->hij", queries, keys[:, of_head])
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    distance = np.arange(N)[:, None] - np.arange(N)
    weights = np.exp(scores) * ((distance >= 0) & (distance < (window or N)))
    total = weights.sum(axis=2, keepdims=True) + (0.0 if sink is None else np.exp(sink)[:, None, None])
    expected = np.einsum("hij,jhd->ihd", weights / total, values[:, of_head])
    np.testing.assert_allclose(ReferenceAttention(window, 0.7, cap, sink)(*arrays), expected, rtol=1e-12)
